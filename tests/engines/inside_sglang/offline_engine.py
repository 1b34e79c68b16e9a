"""`sglang.Engine` with and without a mask, in SGLang's own environment; prints JSON.

python offline_engine.py MODEL_DIR MASK.json
"""

import json
import sys


def main(model, mask):
    import sglang
    from sglang.srt.managers.io_struct import DumperControlReqInput

    from softprune.errors import SoftpruneError
    from softprune.sglang_ext import engine_args

    common = {
        "device": "cpu", "attention_backend": "intel_amx", "skip_tokenizer_init": True, "dtype": "bfloat16", "disable_cuda_graph": True,
        "mem_fraction_static": 0.5, "max_total_tokens": 4096, "sampling_backend": "pytorch", "disable_hybrid_swa_memory": True,
        "moe_runner_backend": "triton", "grammar_backend": "none",
    }  # fmt: skip
    found = {}
    for name, args in (("masked", engine_args(model, expert_mask=mask)), ("plain", {"model_path": model})):
        engine = sglang.Engine(**args, **common)
        answer = engine.generate(input_ids=[list(range(30))], sampling_params={"max_new_tokens": 12, "temperature": 0, "ignore_eos": True})
        found[f"{name} ids"] = answer[0]["output_ids"]
        status = DumperControlReqInput(method="softprune/status", body={})
        if name == "masked":
            (reply,) = engine.loop.run_until_complete(engine.tokenizer_manager.dumper_control(status))
            found[name] = reply.response[0]["answer"][0]
        engine.shutdown()
    try:
        engine_args(model, expert_mask="missing.json")
    except SoftpruneError as error:
        found["broken"] = f"{type(error).__name__}: {error}"
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
