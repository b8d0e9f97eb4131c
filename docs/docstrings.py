"""How docstrings become pages of the site: an extension of Griffe, which mkdocstrings reads with.

Our docstrings describe arguments and fields in lines such as `size: height and width in pixels.`
Markdown would join these lines to one paragraph, so they become a list here.
"""

import re
from collections.abc import Collection
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    def on_class(self, *, cls: griffe.Class, loader: griffe.GriffeLoader, **kwargs) -> None:
        if _has_fields(cls) and "__init__" not in cls.members:
            cls.set_member("__init__", _constructor(cls))
        call: Any = cls.members.get("__call__")
        parameters = [*cls.parameters, *(call.parameters if call and call.is_function else [])]
        _rewrite(cls, {*cls.members, *(parameter.name for parameter in parameters)})

    def on_function(self, *, func: griffe.Function, loader: griffe.GriffeLoader, **kwargs) -> None:
        _rewrite(func, {parameter.name for parameter in func.parameters})
        for each in (func.returns, *(parameter.annotation for parameter in func.parameters)):
            _quote_shapes(each)

    def on_module(self, *, mod: griffe.Module, loader: griffe.GriffeLoader, **kwargs) -> None:
        _rewrite(mod)

    def on_attribute(
        self, *, attr: griffe.Attribute, loader: griffe.GriffeLoader, **kwargs
    ) -> None:
        _rewrite(attr)
        _quote_shapes(attr.annotation)


def _has_fields(cls: griffe.Class) -> bool:
    """Whether it is a NamedTuple or a dataclass of Flax; Griffe itself knows those of Python."""
    bases = {str(base).rpartition(".")[2] for base in cls.bases}
    decorators = {str(decorator.value) for decorator in cls.decorators}
    return "NamedTuple" in bases or "struct.dataclass" in decorators


def _constructor(cls: griffe.Class) -> griffe.Function:
    kind = griffe.ParameterKind.positional_or_keyword
    members: Any = cls.members.values()
    fields = [
        griffe.Parameter(each.name, annotation=each.annotation, default=each.value, kind=kind)
        for each in members
        if each.is_attribute and each.annotation and "property" not in each.labels
    ]
    parameters = griffe.Parameters(griffe.Parameter("self", kind=kind), *fields)
    return griffe.Function("__init__", parameters=parameters, parent=cls)


def _quote_shapes(annotation: Any) -> None:
    """Restores shapes such as "B *Q", which Griffe reads as the product of B and Q."""
    if not isinstance(annotation, griffe.Expr):
        return
    if isinstance(annotation, griffe.ExprSubscript):
        of: Any = annotation.left
        inside: Any = annotation.slice
        of_jaxtyping = isinstance(of, griffe.Expr) and of.canonical_path.startswith("jaxtyping.")
        if of_jaxtyping and isinstance(inside, griffe.ExprTuple):
            *array, shape = inside.elements
            text = str(shape).strip("\"'").replace("* ", "*")
            inside.elements = [*array, f'"{text}"']
    for part in annotation.iterate(flat=False):
        if part is not annotation:
            _quote_shapes(part)


def _rewrite(obj: griffe.Object, names: Collection[str] = ()) -> None:
    if obj.docstring:
        paragraphs = obj.docstring.value.split("\n\n")
        obj.docstring.value = "\n\n".join(_as_markdown(text, names) for text in paragraphs)


def _as_markdown(paragraph: str, names: Collection[str]) -> str:
    if paragraph.startswith("    "):  # code
        return paragraph
    if paragraph.startswith("Raises:"):
        return "Raises:\n\n" + _as_list(_joined(paragraph[7:]), r"[A-Z]\w+")
    # A class may also describe fields of those that inherit it.
    known = "|".join([*sorted(map(re.escape, names), key=len, reverse=True), "[a-z]+(?:_[a-z]+)+"])
    prose, lines = [], paragraph.removeprefix("Args:\n").splitlines()
    while lines and not re.match(rf" *(?:{known})(?:, (?:{known}))*: ", lines[0]):
        prose.append(lines.pop(0))
    parts = ["\n".join(prose), _as_list(_joined("\n".join(lines)), known)]
    # `<eos>` is a token here and would be a tag there.
    text = "\n\n".join(part for part in parts if part)
    return re.sub(r"(`[^`]*`)|<(?=\w)", lambda found: found[1] or "&lt;", text)


def _joined(text: str) -> str:
    return " ".join(text.split())


def _as_list(text: str, name: str) -> str:
    """A text such as `a: about it. b, c: about both.` as a list."""
    starts = list(re.finditer(rf"(?:^|(?<=[.;)\]] ))((?:{name})(?:, (?:{name}))*): ", text))
    if not starts:
        return text
    ends = [found.start() for found in starts[1:]] + [len(text)]
    rows = [text[: starts[0].start()]]
    for found, end in zip(starts, ends, strict=True):
        about = text[found.end() : end].strip().replace(" Raises ", "\n\nRaises ")
        rows.append(f"- **`{found[1].replace(', ', '`, `')}`**: {about}")
    return "\n".join(row for row in rows if row)
