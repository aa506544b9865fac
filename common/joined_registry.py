"""A registry of components of which several may be chosen at once."""

import typing

from common.conditions import JOINT
from common.registry import Registry


class JoinedRegistry(Registry):
    """Its option takes a name, or several joined by '+', such as 'attention+mamba2'.

    The order of the names has no meaning. A component with `joins = False` stands alone.
    """

    form_hint = ", or several joined by '+'"

    def components(self, value: str) -> dict[str, typing.Any]:
        return {name: self[name] for name in value.split(JOINT)}

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, str):
            return False
        names = value.split(JOINT)
        if not all(super(JoinedRegistry, self).__contains__(name) for name in names):
            return False
        joins = all(getattr(self[name], 'joins', True) for name in names)
        return len(names) == 1 or (joins and len(names) == len({*names}))

    def canonical(self, value: str) -> str:
        return JOINT.join(sorted(value.split(JOINT)))
