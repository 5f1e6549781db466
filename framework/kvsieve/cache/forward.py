"""The kind of a forward pass, as a layer of the cache sees it: decided here, once."""

import enum


class Forward(enum.Enum):
    """Kinds of a forward, by what its new tokens are."""

    CHUNK = "a piece of a prompt; more of it follows"
    PROMPT = "a whole prompt, or its last piece"
    PROBE = "tokens that are observed, and then taken back"
    STEP = "a decode step"


def kind_of_forward(new: int, *, held: bool, fed: int, prompt_end: int | None) -> Forward:
    """Decide what `new` tokens a row are, where whoever feeds them does not say it.

    Args:
        held: the cache held tokens before them.
        fed: token columns fed so far, these included.
        prompt_end: columns after which the prompt is complete, where that is known.
    """
    if prompt_end is not None and fed <= prompt_end:
        return Forward.PROMPT if fed == prompt_end else Forward.CHUNK
    return Forward.STEP if new == 1 and held else Forward.PROMPT
