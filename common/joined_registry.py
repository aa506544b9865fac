"""A registry of components of which several may be chosen at once."""

import typing

from common.conditions import JOINT
from common.errors import UserError
from common.registry import Registry


class JoinedRegistry(Registry):
    """Its option takes a name, or several joined by '+', such as 'attention+mamba2'.

    The order of the names has no meaning. A component with `joins = False` stands alone.
    """

    @property
    def form_hint(self) -> str:
        alone = [repr(name) for name in self if not self._joins(name)]
        but = f'other than {" and ".join(alone)}, ' if alone else ''
        return f", or several {but}each once, joined by '+'"

    def _check(self, name: str, component: typing.Any) -> None:
        super()._check(name, component)
        if JOINT in name:
            raise UserError(
                f'{self.option}={name!r}: the name of a component cannot contain {JOINT!r}, which '
                f'joins several. Rename it, for example to {name.replace(JOINT, "_")!r}.'
            )

    def _joins(self, name: str) -> bool:
        return getattr(self[name], 'joins', True)

    def components(self, value: str) -> dict[str, typing.Any]:
        return {name: self[name] for name in value.split(JOINT)}

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, str):
            return False
        names = value.split(JOINT)
        if not all(super(JoinedRegistry, self).__contains__(name) for name in names):
            return False
        return len(names) == 1 or (all(map(self._joins, names)) and len(names) == len({*names}))

    def canonical(self, value: str) -> str:
        return JOINT.join(sorted(value.split(JOINT)))
