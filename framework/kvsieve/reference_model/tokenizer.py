"""The reference model's tokenizer in transformers' format: one token per byte and three special tokens."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = 256, 257, 258
VOCABULARY = 259


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes 0..255 are tokens 0..255; then come `<bos>`, `<eos>`, `<pad>`. Every text begins with `<bos>`."""
    # GPT-2's printable characters for the 256 bytes: printable bytes stand for themselves.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    stand_in = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in stand_in]
    stand_in |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab={stand_in[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>", "<pad>"])
    # As in training: the model has never seen a text without <bos>.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
