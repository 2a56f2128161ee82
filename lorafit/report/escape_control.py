"""Text of others (rows, names, comments, model output) so that it cannot steer a terminal or the order of a line."""


def inert(text: str) -> str:
    """`text` with what does not print spelt out: control characters, ESC, NUL, bidi overrides. Line ends stay."""
    return "".join(
        letter if letter == "\n" or letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )
