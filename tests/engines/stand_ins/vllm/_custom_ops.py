"""SGLang's rotary embedding imports this kernel where there is no GPU, and then runs in plain PyTorch."""

rotary_embedding = None
