"""Text that strangers wrote, made safe to show: a model's answer, a plug-in's exception, a record's name."""

import re

# Control characters (ANSI escapes, NUL), marks that turn the direction of text, invisible ones, and
# lone surrogates, which UTF-8 cannot write.
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def plain(value) -> str:
    """Text in which what would act or hide stands as its code point: ⟨U+001B⟩."""
    text = str(value).replace("\r\n", "\n").replace("\r", "\n")
    return UNSEEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)
