"""Saving of matplotlib figures: text in any script, and atomic writes."""

import contextlib
import functools
import logging
import os

from keras_tnt.files import replacing
from keras_tnt.text import printable


def drawable(text):
    r"""Returns text as figures can show it; characters without an installed font become `\u732b`.

    Dollar signs are escaped, because matplotlib parses text between two of them as math.
    """
    shown = "".join(c if family_of(c) else escape(c) for c in printable(text))
    return shown.replace("$", r"\$")


def escape(character):
    r"""Returns a character as a Python escape, such as `\u732b`."""
    return character.encode("unicode_escape").decode("ascii")


@functools.cache
def family_of(character):
    """Returns a font family that can draw a character, matplotlib's default first; or `None`."""
    from matplotlib import font_manager

    default = font_manager.findfont(font_manager.FontProperties())
    if ord(character) in characters(default):
        return font_manager.get_font(default).family_name
    # matplotlib's own font list is cached, and stale once fonts are added or removed.
    for path in sorted(font_manager.findSystemFonts()):
        if ord(character) in characters(path):
            font_manager.fontManager.addfont(path)
            return font_manager.get_font(path).family_name
    return None


@functools.cache
def characters(path):
    """Returns the code points that a font file can draw; none for an unreadable file."""
    from matplotlib import font_manager

    try:
        return frozenset(font_manager.get_font(path).get_charmap())
    except (OSError, RuntimeError):  # a font that was removed, or is damaged
        return frozenset()


def save(figure, path, **options):
    """Writes a figure atomically, in the format of the path's extension; PNG without one.

    Args:
        figure: matplotlib figure. Fonts that a text needs are appended to the text's own.
        path: path of the file.
        options: options of `savefig`, such as `dpi`.
    """
    from matplotlib.text import Text

    for axes in figure.axes:
        axes.get_xticklabels(), axes.get_yticklabels()  # creates the labels' text
    for text in figure.findobj(Text):
        needed = {family_of(c) for c in text.get_text() if not c.isspace()} - {None}
        had = text.get_fontfamily()
        text.set_fontfamily([*had, *sorted(needed - set(had))])
    with replacing(path) as temporary, silent("matplotlib.font_manager"):
        figure.savefig(
            temporary, format=os.path.splitext(temporary)[1].lstrip(".") or "png", **options
        )


@contextlib.contextmanager
def silent(name):
    """Suppresses a logger's warnings inside the context.

    matplotlib would warn once per text about a font that has a single weight.
    """
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
