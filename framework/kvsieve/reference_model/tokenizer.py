"""The reference model's tokenizer: one token a byte, plus three special ones, in transformers' format."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = 256, 257, 258
VOCABULARY = 259


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes 0..255 are tokens 0..255; then `<bos>`, `<eos>`, `<pad>`. A text is given a `<bos>` in front."""
    # GPT-2's printable stand-ins for the 256 bytes; the ones that stand for themselves come first there.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    stand_in = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in stand_in]
    stand_in |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab={stand_in[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>", "<pad>"])
    # Every text begins with <bos>, as in training: without it the model has lost its footing.
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
