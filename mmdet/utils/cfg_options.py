"""The values of ``--cfg-options key.subkey=value``."""

import argparse
import ast
from contextlib import suppress
from typing import Any

from mmengine.config import DictAction


class CfgOptions(DictAction):
    """The argparse action of ``--cfg-options a.b=c ...``: mmengine's, which says what is malformed, leaves
    the spaces of strings in place, takes dicts (``custom_hooks=[dict(type='EMAHook')]``) and leaves a quoted
    value a string (``"'2024'"``)."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:
        for value in values:
            key, equals, text = value.partition('=')
            if not (key and equals) or any(text.count(a) != text.count(b) for a, b in ('()', '[]')):
                parser.error(f'--cfg-options: {value!r} is not of the form key.subkey=value')
            try:
                super().__call__(parser, namespace, [value], option_string)
            except (SyntaxError, ValueError):
                parser.error(f'--cfg-options: {value!r}: expected Python such as [dict(key=1)]')

    @staticmethod
    def _parse_iterable(val: str) -> Any:
        if 'dict(' in val or '{' in val:
            return ast.literal_eval(_DictCalls().visit(ast.parse(val.strip(), mode='eval')))
        with suppress(SyntaxError, ValueError):  # of words without quotes
            if val[:1] in ('(', '[') and isinstance(literal := ast.literal_eval(val), list | tuple):
                return literal
            if val[:1] in ('"', "'") and isinstance(literal := ast.literal_eval(val), str):
                if literal[:1] + literal[-1:] not in ('()', '[]'):
                    return val[1:-1] if '\\' in val else literal
        bare = val.strip('\'" ')
        if ',' in val or bare[:1] + bare[-1:] in ('()', '[]'):
            return DictAction._parse_iterable(val)
        return DictAction._parse_int_float_bool(val.strip('\'"'))


class _DictCalls(ast.NodeTransformer):
    """``dict(key=value)`` as a literal."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        names = [keyword.arg for keyword in node.keywords]
        if ast.unparse(node.func) != 'dict' or node.args or None in names:
            return node
        return ast.Dict([ast.Constant(name) for name in names], [keyword.value for keyword in node.keywords])
