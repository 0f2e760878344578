r"""One LaTeX spelling for what people and models write in many: Unicode, calculator syntax, typesetting, separators.

`spell` keeps the meaning of all of a text, and drops nothing that has one: what it does not know stays, so that whoever
reads the result fails rather than reads a part.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

# Signs whose LaTeX command is what they mean. Superscripts, vulgar fractions and roots are no single sign in LaTeX.
_SIGNS = {
    **dict.fromkeys("−‐‑‒–—﹣－", "-"),
    **dict.fromkeys("×⋅·∙•∗✕✖⨯", r"\cdot "),
    **{"÷": "/", "∕": "/", "⁄": "/", "／": "/", "∶": ":", "：": ":", "，": ", ", "；": ";", "、": ", ", "。": "."},
    **{
        "∞": r"\infty ",
        "π": r"\pi ",
        "°": r"^\circ ",
        "±": r"\pm ",
        "∓": r"\mp ",
        "∅": r"\emptyset ",
        "⌀": r"\emptyset ",
    },
    **{"≤": r"\le ", "≦": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "≧": r"\ge ", "⩾": r"\ge ", "≠": r"\ne "},
    **{
        "≈": r"\approx ",
        "≡": r"\equiv ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        "∉": r"\notin ",
        "∖": r"\setminus ",
    },
    **{"…": r"\ldots ", "⋯": r"\ldots ", "′": "'", "’": "'", "‘": "'", "“": '"', "”": '"', "″": "''"},
    **{"⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "⟨": "(", "⟩": ")", "〈": "(", "〉": ")"},
    **{"ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}"},
    **{"∴": r"\therefore ", "⇒": r"\Rightarrow "},
    **{"→": r"\to ", "∠": r"\angle ", "∑": r"\sum ", "∏": r"\prod ", "∫": r"\int ", "ℓ": "l", "µ": r"\mu "},
}


def _letter(sign: str) -> str:
    r"""α → \alpha, Γ → \Gamma; "": no letter with a command of its own."""
    words = unicodedata.name(sign, "").split()
    if words[:2] not in (["GREEK", "SMALL"], ["GREEK", "CAPITAL"]) or len(words) != 4:
        return ""
    return f"\\{words[3].lower() if words[1] == 'SMALL' else words[3].title()} "


_GREEK = {chr(code): _letter(chr(code)) for code in range(0x391, 0x3CA) if _letter(chr(code))}
_GREEK |= {"λ": r"\lambda ", "Λ": r"\Lambda ", "φ": r"\phi ", "ϕ": r"\phi ", "ϑ": r"\theta ", "ε": r"\epsilon "}
_TABLE = str.maketrans(_GREEK | _SIGNS)
_UP = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ", "0123456789+-=()ni")
_DOWN = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₙ", "0123456789+-=()n")
_SUPERSCRIPTS = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ]+")
_SUBSCRIPTS = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₙ]+")
_VULGAR = re.compile("[¼½¾⅐-⅞↉]")
_UNICODE_ROOT = re.compile(r"([√∛∜])\s*(\d+(?:\.\d+)?|\\?[A-Za-z]+|(?=[({]))?")
_ROOTS = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}

# Commands around an argument that change its looks alone.
_LOOKS = (
    *(
        "boldsymbol",
        "bm",
        "pmb",
        "mathbf",
        "mathit",
        "mathsf",
        "mathtt",
        "mathcal",
        "mathfrak",
        "mathscr",
        "mathnormal",
    ),
    *("underline", "underbrace", "overbrace", "cancel", "ensuremath", "displaystyle", "fbox", "boxed", "framebox"),
)
_MARKED = ("text", "textbf", "textit", "textrm", "textnormal", "textsf", "texttt", "textsc", "textup", "emph", "mathrm")
_TEXTS = (*_MARKED, "mbox", "hbox", "operatorname", "operatorname*", "rm", "bf")
_PHANTOMS = ("phantom", "hphantom", "vphantom", "hspace", "vspace", "label", "tag", "kern", "color")
_GONE = re.compile(
    r"\\(?:left|right|bigg?[lr]?|Bigg?[lr]?|middle)(?:\s*\.(?!\d)|(?![A-Za-z]))"
    r"|\\(?:tiny|scriptsize|footnotesize|small|normalsize|large|Large|LARGE|huge|Huge)(?![A-Za-z])"
    r"|\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|nonumber|centering|bfseries|itshape|rmfamily|strut"
    r"|mathrm(?=\s*\\)|bf|rm|it|tt|sf)(?![A-Za-z{])|\\!\s*|\\-"
)
_SPACES = re.compile(
    r"(?<!\\)\\(?:[,;: >]|q?quad(?![A-Za-z])|hfill|enspace|thinspace|space)|~"
    r"|[\u00a0\u2000-\u200a\u202f\u205f\u3000]"
)
_SAME = {
    **dict.fromkeys(("dfrac", "tfrac", "cfrac", "sfrac", "nicefrac"), "frac"),
    **dict.fromkeys(("leq", "leqslant", "leqq"), "le"),
    **dict.fromkeys(("geq", "geqslant", "geqq"), "ge"),
    **dict.fromkeys(("neq",), "ne"),
    **dict.fromkeys(("times", "ast", "cdotp", "bullet"), "cdot"),
    **dict.fromkeys(("dots", "cdots", "dotsc", "dotsb", "dotsm", "dotso", "vdots", "ddots"), "ldots"),
    **dict.fromkeys(("varnothing", "O"), "emptyset"),
    **dict.fromkeys(("infin", "infinity"), "infty"),
    **dict.fromkeys(("degree", "degrees"), "deg"),
    **dict.fromkeys(("simeq", "sim", "thickapprox"), "approx"),
    **dict.fromkeys(("dbinom", "tbinom"), "binom"),
    **{
        "varphi": "phi",
        "varepsilon": "epsilon",
        "vartheta": "theta",
        "smallsetminus": "setminus",
        "backslash": "setminus",
    },
    **{"lbrace": "{", "rbrace": "}", "lbrack": "[", "rbrack": "]", "lvert": "vert", "rvert": "vert", "mid": "vert"},
    **{
        "exponentialE": "e",
        "imaginaryI": "i",
        "arctg": "arctan",
        "tg": "tan",
        "ctg": "cot",
        "sh": "sinh",
        "ch": "cosh",
    },
    **{"bmod": "mod", "land": "text{ and }", "wedge": "text{ and }", "lor": "text{ or }", "vee": "text{ or }"},
}
_COMMAND = re.compile(r"\\([A-Za-z]+\*?)")
_UNIT_LETTER = re.compile(  # 5\,\mathrm{m}, at the end
    r"([\d}]) *\\(?:mathrm|text|textrm|rm|mbox)\{ ?([mgshlNJWVK]|sec) ?\}(?=\s*(?:\^\{?[23]\}?\s*)?(?:[,;.)$/]|$))"
)
_PLAIN = {"lt": "<", "gt": ">", "div": "/", "colon": ":", "langle": "(", "rangle": ")", "vert": "|", "deg": r"^\circ "}
_PLAIN |= {"lg": r"\log_{10} "}
_FUNCTIONS = (
    *(
        "arcsin",
        "arccos",
        "arctan",
        "sinh",
        "cosh",
        "tanh",
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "log",
        "ln",
        "exp",
    ),
    *("asin", "acos", "atan"),
)
_NAMES = {"asin": "arcsin", "acos": "arccos", "atan": "arctan"}
_WORD_SIGNS = (*("pi", "alpha", "beta", "gamma", "delta", "theta", "lambda", "sigma", "phi", "omega", "infty"),)
_CALL = re.compile(rf"(?<![\\A-Za-z])({'|'.join(_FUNCTIONS)})(?=\s*[({{^_]|\s+\\?[A-Za-z0-9]\b|\s*\\)")
_ROOT_CALL = re.compile(r"(?<![\\A-Za-z])(sqrt|cbrt)\s*(?=[({])")
_WORD_SIGN = re.compile(rf"(?<![\\A-Za-z])({'|'.join(_WORD_SIGNS)}|infinity|inf|oo)(?![A-Za-z])")
_PI_BEHIND = re.compile(r"(?<=\d)pi(?![A-Za-z])")
_E_NOTATION = re.compile(r"(?<![\w.\\])(\d+(?:\.\d+)?|\.\d+)[eE]([+-]?\d+)(?![\w.]*[A-Za-z_])")
_MIXED = re.compile(r"(?<![\w.,/^}{])(\d+) +(\d+)/(\d+)(?![\w/])")
_PERCENT = re.compile(r"(?<=[\d}$)]) ?(?:\\text\{ ?)?(?:percent(?:age)?|pct)(?![A-Za-z])(?: ?\})?", re.IGNORECASE)
_GROUPS = re.compile(r"(?<![\d.,])(\d{1,3})((?:(?:\{,\}|\\,|[ \u00a0\u2009\u202f])\d{3})+)(?![\d])")
_SINGLE = re.compile(r"(?<=[\dA-Za-z})]) ?\{ ?([:=<>+-]) ?\}")  # spacing in LaTeX: 10{:}15
_LATEX_DECIMAL = re.compile(r"(?<=\d)\{,\}(?=\d{1,2}(?!\d))")  # 3{,}5 is 3.5
_THIN_COMMA = re.compile(r"(?<=\d)\s*\{\s*,\s*\}\s*(?=\d{3}(?!\d))|(?<=\d),\\!\s*(?=\d{3}(?!\d))")

TEXT = re.compile(r"\\text\{([^{}]*)\}")  # words, as they are marked in a spelled text


def spell(text: str) -> str:
    """The text in one spelling; what is equal afterwards was written to mean the same."""
    text = _plain_characters(text)
    if "matrix" not in text and "cases" not in text and "array" not in text:
        text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text)  # escaped twice
    text = _GROUPS.sub(lambda found: found[1] + re.sub(r"\D", "", found[2]), text)
    text = _GONE.sub(lambda found: "" if found[0].startswith(("\\!", "\\-")) else " ", text)
    text = _GROUPS.sub(lambda found: found[1] + re.sub(r"\D", "", found[2]), _THIN_COMMA.sub("", text))
    text = _SINGLE.sub(r"\1", _LATEX_DECIMAL.sub(".", _SPACES.sub(" ", text)))
    text = re.sub(r"\\textcolor\s*\{[^{}]*\}", r"\\mathit", text)
    text = _UNIT_LETTER.sub(r"\1 \\text{ \2 }", text)
    for names, act in ((_PHANTOMS, lambda inside: " "), (_LOOKS, lambda inside: f" {inside} "), (_TEXTS, _text)):
        text = _arguments(text, names, act)
    text = _COMMAND.sub(_command, text)
    text = re.sub(r"(?<!\\)([(\[,{]\s*)\\[{}]?$", r"\1", text)
    text = _ROOT_CALL.sub(lambda found: r"\sqrt" if found[1] == "sqrt" else r"\sqrt[3]", text)
    text = _CALL.sub(lambda found: rf"\{_NAMES.get(found[1], found[1])} ", text)
    text = _WORD_SIGN.sub(lambda found: rf"\{'infty' if found[1].startswith(('inf', 'oo')) else found[1]} ", text)
    text = _PI_BEHIND.sub(r"\\pi ", text)
    text = re.sub(r"(?:\*\*|\^) ?(-(?:\d+|[A-Za-z](?![A-Za-z])|\\[A-Za-z]+))", r"^{\1}", text)
    text = re.sub(r"_ ?(\d+)(?= )|(?<=log)_ ?(\d)(?=\d)", r"_{\1\2}", text)  # \log_2 8, \log_28
    text = re.sub(r"\^ ?(?:\\prime(?![A-Za-z])|\{ ?\\prime ?\})", "'", text)
    text = (
        text.replace("**", "^")
        .replace("*", r"\cdot ")
        .replace("!=", r"\ne ")
        .replace("<=", r"\le ")
        .replace(">=", r"\ge ")
    )
    text = _E_NOTATION.sub(
        lambda found: rf"{found[1]} \cdot 10^{{{int(found[2])}}}" if len(found[2]) < 9 else found[0], text
    )
    text = _PERCENT.sub(r"\\%", text)
    text = _infix(_infix(text, "over", "frac"), "choose", "binom")
    text = _braces(text)
    text = _MIXED.sub(lambda m: rf"{m[1]}\frac{{{m[2]}}}{{{m[3]}}}" if int(m[2]) < int(m[3]) else m[0], text)
    text = re.sub(r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![A-Za-z])", r"^\\circ ", text)
    text = re.sub(r"\\?%", r"\\%", text)
    return re.sub(r"\s+", " ", text).strip()


def _plain_characters(text: str) -> str:
    text = "".join(c for c in text if unicodedata.category(c) != "Cf")  # marks of direction, joiners
    text = _SUPERSCRIPTS.sub(lambda found: "^{" + found[0].translate(_UP) + "}", text)
    text = _SUBSCRIPTS.sub(lambda found: "_{" + found[0].translate(_DOWN) + "}", text)
    text = _VULGAR.sub(_vulgar, text)
    text = _UNICODE_ROOT.sub(_unicode_root, text)
    text = text.translate(_TABLE)
    return "".join(unicodedata.normalize("NFKC", c) if ord(c) > 127 and not _SPACES.match(c) else c for c in text)


def _vulgar(found: re.Match[str]) -> str:
    top, _, bottom = unicodedata.normalize("NFKC", found[0]).partition("⁄")
    return rf"\frac{{{top}}}{{{bottom}}}"


def _unicode_root(found: re.Match[str]) -> str:
    if found[2] is None:
        return found[0]
    return _ROOTS[found[1]] + (f"{{{found[2]}}}" if found[2] else "")  # `_braces` finds where a bracket ends


def _command(found: re.Match[str]) -> str:
    name = _SAME.get(found[1], found[1])
    return _PLAIN.get(name, f"\\{name}")


def _text(inside: str) -> str:
    r"""\text{…}: words stay marked as such, signs and numbers and single letters do not."""
    inside = re.sub(r"(?<=[a-z])\^ ?\{ ?(-?\d) ?\}", r"\1", inside)  # mol^{-1}
    bare = inside.strip()
    if (re.fullmatch(r"[A-Za-z]", bare) and bare == inside) or not re.search(r"[A-Za-z]", bare) or "\\" in bare:
        return f" {inside} "
    if bare == "sec" and inside != bare:  # seconds; `_UNIT_LETTER` leaves blanks around them
        return rf"\text{{{inside}}}"
    if bare in _FUNCTIONS or bare in ("lim", "max", "min", "gcd", "lcm", "mod", "det", "arcsin"):
        return f"\\{bare} " if bare in _FUNCTIONS else rf"\text{{{bare}}}"
    return rf"\text{{{inside}}}"


def _arguments(text: str, names: tuple[str, ...], act: Callable[[str], str]) -> str:
    """Every `\\name{argument}` (or of one token) replaced by what `act` makes of its argument; innermost first."""
    pattern = re.compile(
        rf"\\(?:{'|'.join(re.escape(n) for n in sorted(names, key=len, reverse=True))})(?![A-Za-z])\s*"
    )
    place = len(text)
    for match in reversed(list(pattern.finditer(text))):
        if match.start() >= place:
            continue
        begin = match.end()
        if text[begin : begin + 1] == "{":
            end = closing(text, begin)
            if end < 0:
                continue
            text = text[: match.start()] + act(text[begin + 1 : end]) + text[end + 1 :]
        elif token := re.match(r"\\[A-Za-z]+|[^\\\s{}]", text[begin:]):
            text = text[: match.start()] + act(token[0]) + text[begin + token.end() :]
    return text


def closing(text: str, opening: int) -> int:
    """Where the brace at `opening` closes; -1: never."""
    depth = 0
    for position in range(opening, len(text)):
        if text[position] == "{" and (position == 0 or text[position - 1] != "\\"):
            depth += 1
        elif text[position] == "}" and text[position - 1] != "\\":
            depth -= 1
            if depth == 0:
                return position
    return -1


def _infix(text: str, name: str, command: str) -> str:
    r"""{a \over b} → \frac{a}{b}"""
    while (match := re.search(rf"\\{name}(?![A-Za-z])", text)) is not None:
        begin = _opening(text, match.start())
        end = closing(text, begin) if begin >= 0 else len(text)
        if end < 0:
            return text  # a brace that never closes
        top, bottom = text[begin + 1 : match.start()], text[match.end() : end]
        text = text[: max(begin, 0)] + rf"\{command}{{{top}}}{{{bottom}}}" + text[end + 1 :]
    return text


def _opening(text: str, inside: int) -> int:
    depth = 0
    for position in range(inside - 1, -1, -1):
        if text[position] == "}" and text[position - 1] != "\\":
            depth += 1
        elif text[position] == "{" and (position == 0 or text[position - 1] != "\\"):
            if depth == 0:
                return position
            depth -= 1
    return -1


_TOKEN = re.compile(r"\\[A-Za-z]+|[^\\\s{}]")
_TAKES = re.compile(r"\\(frac|binom|sqrt)(?![A-Za-z])\s*|([\^_])\s*(?=[({])|(?<![\\A-Za-z])(abs)(?=\()")
_COMMAS_WITHIN = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def _braces(text: str) -> str:
    r"""\frac12 → \frac{1}{2}, \sqrt2 and \sqrt(2) → \sqrt{2}, x^(2) → x^{2}; abs(x) → |x|; in braces 1,000 → 1000."""
    pieces: list[str] = []
    position = 0
    for match in _TAKES.finditer(text):
        if match.start() < position:
            continue
        pieces.append(text[position : match.start()])
        name, position = match[1], match.end()
        if match[3]:
            argument, position = _argument(text, position)
            pieces.append(f"|{argument}|")
            continue
        if name is None:
            argument, position = _argument(text, position)
            pieces.append(f"{match[2]}{{{argument}}}")
            continue
        if name == "sqrt" and text[position : position + 1] == "[" and (end := text.find("]", position)) > 0:
            index, position = text[position : end + 1], end + 1
            argument, position = _argument(text, position)
            pieces.append(rf"\sqrt{index}{{{argument}}}")
            continue
        pieces.append(f"\\{name}")
        for _ in range(1 if name == "sqrt" else 2):
            argument, position = _argument(text, position)
            pieces.append(f"{{{argument}}}")
    return "".join([*pieces, text[position:]])


def _argument(text: str, position: int) -> tuple[str, int]:
    """What a command takes at a place: a group, something in parentheses, or one token; and where that ends."""
    while text[position : position + 1] == " ":
        position += 1
    first = text[position : position + 1]
    if first == "{":
        end = closing(text, position)
        if end < 0:
            return "", position
        return _braces(_COMMAS_WITHIN.sub("", text[position + 1 : end])), end + 1
    if first == "(":
        depth = 0
        for end in range(position, len(text)):
            depth += (text[end] == "(") - (text[end] == ")")
            if depth == 0:
                return _braces(text[position + 1 : end]), end + 1
    token = _TOKEN.match(text, position)
    if token is None:
        return "", position
    return token[0], token.end()
