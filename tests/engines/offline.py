"""Runs models through vLLM's `LLM` in one process and writes what came out, as JSON.

    python offline.py JOBS.json OUT.json

A job is {"name", "model", "softprune" (additional_config, or null) or "llm_args", "prompts" (lists of token ids),
"max_tokens", "args" (for LLM), "rpc" (calls to workers before the prompts)}. Prompts run one at a time.
A job that fails leaves {"name", "error"}.
"""

import gc
import json
import os
import sys
import time
import traceback

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1"
)


def run(job):
    from vllm import LLM, SamplingParams

    args = {"enforce_eager": True, "max_model_len": 2048, "dtype": "bfloat16", "enable_prefix_caching": False}
    args |= {"distributed_executor_backend": "uni", "max_num_batched_tokens": 2048, **job.get("args", {})}
    if job.get("softprune") is not None:
        args["additional_config"] = {"softprune": job["softprune"]}
    if job.get("llm_args") is not None:
        from softprune.vllm_ext import llm_args

        args |= llm_args(**job["llm_args"])
    start = time.time()
    llm = LLM(model=job["model"], skip_tokenizer_init=True, **args)
    boot_s = time.time() - start
    for call in job.get("rpc", []):
        try:
            llm.collective_rpc(call["method"], kwargs=call.get("kwargs"))
            call["error"] = None
        except Exception as error:
            call["error"] = f"{type(error).__name__}: {error}"
    asked = job.get("softprune") or job.get("llm_args") or {}
    debug = bool(asked.get("debug_routes"))
    if debug:
        llm.collective_rpc("softprune_routes", kwargs={"reset": True})
    params = SamplingParams(max_tokens=job["max_tokens"], temperature=0, prompt_logprobs=0, logprobs=0, detokenize=False, ignore_eos=True)
    tokens, logprobs = [], []
    for prompt in job["prompts"]:
        output = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)[0]
        ids = list(output.outputs[0].token_ids)
        tokens.append(ids)
        scored = [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
        logprobs.append(scored + [entry[token].logprob for entry, token in zip(output.outputs[0].logprobs, ids, strict=True)])
    result = {"name": job["name"], "tokens": tokens, "logprobs": logprobs, "boot_s": boot_s, "rpc": job.get("rpc", [])}
    if debug:
        result["routes"] = llm.collective_rpc("softprune_routes")
    if asked:
        result["status"] = llm.collective_rpc("softprune_status")
    llm.llm_engine.engine_core.shutdown()
    return result


def release_memory():
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        jobs = json.load(file)
    results = []
    if os.path.exists(sys.argv[2]):  # go on where an earlier run was cut off
        with open(sys.argv[2]) as file:
            results = [result for result in json.load(file) if "error" not in result]
    for job in jobs:
        try:
            results.append(run(job))
        except Exception as error:
            traceback.print_exc()
            results.append({"name": job["name"], "error": repr(error)})
        release_memory()
        print(job["name"], results[-1].get("error") or f"{results[-1]['boot_s']:.1f} s", flush=True)
        with open(sys.argv[2], "w") as file:
            json.dump(results, file)
