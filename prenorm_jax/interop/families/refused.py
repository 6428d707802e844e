"""The families that no table could bring here: why, and what would have to be otherwise."""

_RMSNORM = (
    "its norms are RMSNorms already, and those keep the stream's mean: it is no Pre-LN network, and has no equivalent "
    "of one; its norms would have to be LayerNorms, as those of {} are"
)
_POST_LN = (
    "it is Post-LN: a norm ends each branch, and its γ and β put a mean back into the stream, so that every block "
    "would have to centre at run time and nothing would be gained; the norms would have to begin the branches, as "
    "those of {} do"
)
_MERGING = (
    "where it merges patches one norm takes four tokens together, and so sees the mean of each, which conversion would "
    "remove; each token would have to be normalised before they are merged"
)
_AFTER_BRANCHES = (
    "its norms end the branches, which read the raw stream, mean and all; a norm would have to begin each branch"
)
_NECK = (
    "a convolution behind its image encoder reads the raw stream, mean and all; a LayerNorm would have to stand before "
    "it"
)
_DEPTHWISE = (
    "a depthwise convolution begins each block and reads the raw stream, mean and all; the block's LayerNorm would "
    "have to stand before it"
)

_ALIKE = {
    _RMSNORM.format(
        "olmo"
    ): "llama mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe gemma gemma2 gemma3 gemma3_text phi3 "
    "olmo2 olmo3 granite smollm3 deepseek_v3",
    _RMSNORM.format("mbart and pegasus"): "t5 mt5 umt5",
    _POST_LN.format(
        "roberta-prelayernorm"
    ): "bert roberta distilbert electra albert xlm-roberta camembert mpnet deberta deberta-v2 longformer",
    _POST_LN.format("gpt2"): "openai-gpt",
    _POST_LN.format("mbart and pegasus"): "bart marian",
    _MERGING: "swin",
    _AFTER_BRANCHES: "swinv2",
    _NECK: "sam sam_vision_model",
    _DEPTHWISE: "convnext convnextv2",
}
REFUSED = {name: why for why, names in _ALIKE.items() for name in names.split()}
