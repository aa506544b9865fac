"""The configuration of an architecture: options, presets, derived values, checks, name and hash.

`ModelArchitectureConfig` is the resolved description that the builder, the console, the record and
the checkpoint use:

    config = ModelArchitectureConfig(arch_preset='llama', n_layer=6, vocab_size=65)
    config.name                       # '6L-12H-768D-RoPE-RMS-SwiGLU-PreNorm'
    config.save('architecture.json'); ModelArchitectureConfig.load('architecture.json')

This module imports no torch.
"""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common.architecture_identity import hash_of_layers
from common.architecture_merge import derive_values, merge_architecture, merge_kind, start_of
from common.architecture_options import (
    ACTIVATION_REGISTRY,
    ATTENTION_BACKEND_REGISTRY,
    ATTENTION_REGISTRY,
    CORE_OPTIONS,
    FFN_REGISTRY,
    INITIALIZATION_REGISTRY,
    MIXER_REGISTRY,
    NORM_POSITION_REGISTRY,
    NORM_REGISTRY,
    POSITION_ENCODING_REGISTRY,
    PRESET_OPTION,
    REGISTRIES,
    RESIDUAL_REGISTRY,
    ROPE_SCALING_REGISTRY,
    SHARED_OPTIONS,
    SIZES,
    START_OPTIONS,
    architecture_options,
    component_tags,
    layer_options,
    shared_options,
    short_forms,
)
from common.architecture_presets import PRESETS
from common.errors import UserError
from common.layer_pattern import expand_pattern, letters_of, pattern_tag
from common.layer_table import (
    KindEntries,
    config_lines,
    differing_values,
    ignored_by_layers,
    merged_kinds,
    replaced_short_forms,
    unused_values,
    used_kinds,
    without_pattern,
)
from common.option_merge import Layer, Merge, chosen_components
from common.registry import FrozenConfig, Option, sentences_of, show_value
from common.text_files import parse_json
from configurator import Schema, validate_layer

__all__ = [
    'ACTIVATION_REGISTRY',
    'ATTENTION_BACKEND_REGISTRY',
    'ATTENTION_REGISTRY',
    'CORE_OPTIONS',
    'FFN_REGISTRY',
    'INITIALIZATION_REGISTRY',
    'MIXER_REGISTRY',
    'NORM_POSITION_REGISTRY',
    'NORM_REGISTRY',
    'POSITION_ENCODING_REGISTRY',
    'PRESETS',
    'PRESET_OPTION',
    'REGISTRIES',
    'RESIDUAL_REGISTRY',
    'ROPE_SCALING_REGISTRY',
    'SIZES',
    'Device',
    'ModelArchitectureConfig',
    'architecture_options',
    'layer_of_dict',
    'schema',
]


def schema() -> dict[str, dict[str, Option]]:
    """The options of the architecture, by group of the command line."""
    return {'Architecture': {**START_OPTIONS, **architecture_options()}}


class Device(NamedTuple):
    """What the choice of an attention backend depends on."""

    kind: str  # 'cpu', 'cuda' or 'mps'
    compiles: bool = True  # whether torch.compile works


CPU = Device('cpu')


class ModelArchitectureConfig(FrozenConfig):
    """One resolved architecture: the core options and those of the chosen components.

    Options that no chosen component uses are not attributes. The attention backend, if it is not
    set, is that of a CPU; `for_device` chooses that of another device. Raises UserError, which
    lists every problem.
    """

    device = CPU

    def __init__(self, **values):
        problems: list[str] = []
        layer = validate_layer(Layer('ModelArchitectureConfig()', values), schema(), problems)
        resolved = ModelArchitectureConfig.resolve([layer], problems)
        if problems:
            raise UserError(*problems)
        self.__dict__.update(resolved.__dict__)

    @classmethod
    def resolve(
        cls, layers: list[Layer], problems: list[str], device: Device = CPU
    ) -> 'ModelArchitectureConfig':
        """Merge validated layers, the highest precedence last; derive; add to `problems`.

        Keys that are not options of the architecture are ignored. Every layer overrides the preset
        or the family, whichever layer names it.
        """
        start = start_of(layers, problems)
        stack = [start.layer, *layers]
        base = merge_architecture(stack, problems)
        config = cls._of_merge(base)
        config.__dict__.update(start=start, preset=start.preset, _layers=tuple(layers))
        refused = {key for layer in layers for key in layer.refused}
        if refused & {'like', 'layer_pattern', 'layer_kinds'}:
            config._derive_backend(device)
            return config  # what follows from a mistake that was reported would mislead
        if base.values['layer_pattern'] is None:
            if 'layer_kinds' in base.useless:
                kinds = merged_kinds(stack, layer_options(), [])
                base.useless['layer_kinds'] = without_pattern(kinds)
            problems.extend(base.useless.values())
            config._set_layers(*_layers_of_short_forms(config, stack))
        elif not config._resolve_pattern(stack, base, refused, problems):
            return config
        config._derive_backend(device)
        problems.extend(_problems(config))
        return config

    @classmethod
    def _of_merge(cls, merged: Merge) -> 'ModelArchitectureConfig':
        """Merged values, derived ones included, for layers that are all alike."""
        config = cls.__new__(cls)
        values, origins = dict(merged.values), dict(merged.origins)
        derive_values(values, origins)
        FrozenConfig.__init__(config, values, origins, list(merged.dropped.values()))
        layer_letters = ('',) * values['n_layer']
        config.__dict__.update(kinds={'': config}, layer_letters=layer_letters, _declared={})
        # For `replace`: what was merged, independent of presets.
        layer = Layer('kind of layers', {'arch_preset': 'custom', **merged.values})
        config.__dict__.update(start=start_of([layer], []), preset='custom', _layers=(layer,))
        return config

    def _set_layers(self, letters: list[str], kinds: dict) -> None:
        used = {letter: kinds[letter] for letter in dict.fromkeys(letters)}
        self.__dict__.update(layer_letters=tuple(letters), kinds=used)

    def _resolve_pattern(
        self, stack: list[Layer], base: Merge, refused: set[str], problems: list[str]
    ) -> bool:
        """Resolve the kinds of the layer pattern, each like a model of its own.

        Returns False if short forms contradict the pattern, so that the layers are unknown.
        """
        conflicts, replaced = replaced_short_forms(base, short_forms())
        problems += conflicts
        if conflicts:
            return False
        # 1. Collect the kinds from the layers of options, and merge each.
        notes: list[str] = []
        declared = merged_kinds(stack, layer_options(), problems)
        kinds = used_kinds(declared, base, problems, notes)
        merges = {name: merge_kind(stack, kind.layers(name)) for name, kind in kinds.items()}
        # 2. Give each layer its kind.
        try:
            letters = expand_pattern(base.values['layer_pattern'], self.n_layer)
        except UserError as error:
            problems += error.problems if 'n_layer' not in refused else ()
            letters = ''.join(kinds) * self.n_layer
        layers = letters[: self.n_layer]
        notes += [
            f'no layer is of kind {name}: the pattern is cut off at n_layer={self.n_layer}'
            for name in kinds
            if name not in layers
        ]
        # 3. Check that each value that was set has an effect.
        with_layers = {name: kind for name, kind in kinds.items() if name in layers}
        for check, checked in ((unused_values, kinds), (ignored_by_layers, with_layers)):
            its_problems, its_notes = check(base, checked, merges, shared_options(base.values))
            problems += its_problems
            notes += its_notes
        # 4. Derive the other values of each kind.
        resolved = {name: self._of_merge(merged) for name, merged in merges.items()}
        self._add_model_options(resolved)
        self._leave_out_unused(resolved, bool(kinds.keys() - declared.keys()))
        given = {name: (resolved[name], kind) for name, kind in kinds.items() if name in declared}
        self._values['layer_kinds'] = {
            name: differing_values(config.to_dict(), self.to_dict(), layer_options())
            for name, (config, _) in given.items()
        }
        self.__dict__.update(dropped=[*replaced, *notes], _declared=given)
        self._set_layers(list(layers), resolved)
        return True

    def _add_model_options(self, kinds: dict) -> None:
        """Add options of the whole model, such as document_mask, that only a kind has."""
        of_layers = layer_options().keys() | short_forms()
        for config in kinds.values():
            for key, value in config._values.items():
                if key not in of_layers and key not in self:
                    self._values[key], self.origins[key] = value, config.origins[key]

    def _leave_out_unused(self, kinds: dict, has_base_layers: bool) -> None:
        """Leave out options that neither the model nor any layer uses."""
        for key in short_forms():
            self._values.pop(key, None)
            self.origins.pop(key, None)
        if has_base_layers:
            return
        used = {'layer_kinds', *shared_options(self._values)}
        used.update(*(kind.to_dict() for kind in kinds.values()))
        for key in self._values.keys() - used:
            del self._values[key], self.origins[key]

    @property
    def layers(self) -> tuple['ModelArchitectureConfig', ...]:
        """The options of each layer: for the layer, an architecture whose layers are all alike."""
        return tuple(self.kinds[letter] for letter in self.layer_letters)

    @property
    def is_uniform(self) -> bool:
        """Whether all layers are alike."""
        return len(self.kinds) == 1

    def replace(self, **values) -> 'ModelArchitectureConfig':
        """The same architecture with other values, checked and with derived values updated."""
        problems: list[str] = []
        changed = validate_layer(Layer('replace()', values), schema(), problems)
        config = ModelArchitectureConfig.resolve([*self._layers, changed], problems, self.device)
        if problems:
            raise UserError(*problems)
        return config

    def for_device(self, kind: str, compiles: bool = True) -> 'ModelArchitectureConfig':
        """The same architecture with the attention backend of a device, unless one was set.

        kind: 'cpu', 'cuda' or 'mps'. compiles: whether torch.compile works there.
        """
        device = Device(kind, compiles)
        if device == self.device or not self.derives_backend:
            return self
        copies = {id(config): copy.copy(config) for config in (self, *self.kinds.values())}
        for config in copies.values():
            config.__dict__.update(_values=dict(config._values), origins=dict(config.origins))
            if 'attention_backend' in config:
                config._values['attention_backend'] = None
            kinds = {letter: copies.get(id(kind), kind) for letter, kind in config.kinds.items()}
            config.__dict__['kinds'] = kinds
        copies[id(self)]._derive_backend(device)
        return copies[id(self)]

    @property
    def derives_backend(self) -> bool:
        """Whether the attention backend was not set but depends on the device."""
        return self.origins.get('attention_backend', '').startswith('derived')

    def with_backend(self, name: str) -> 'ModelArchitectureConfig':
        """The same architecture with an attention backend, if any layer has attention."""
        return self.replace(attention_backend=name) if 'attention_backend' in self else self

    def _derive_backend(self, device: Device) -> None:
        """Choose the attention backend that ranks first on the device, if it is None.

        All layers have the same one.
        """
        configs = (self, *self.kinds.values())
        if 'attention_backend' in self and self.attention_backend is None:
            names = list(ATTENTION_BACKEND_REGISTRY)
            ranks = [ATTENTION_BACKEND_REGISTRY[name].rank(self, device) for name in names]
            for config in configs:
                if 'attention_backend' not in config:
                    continue
                config._values['attention_backend'] = names[ranks.index(min(ranks))]
                config.origins['attention_backend'] = f'derived: for {device.kind}'
        for config in configs:
            config.__dict__['device'] = device

    def components(self) -> Iterator[tuple[str, Any]]:
        """The option and the class of each component that the model or any layer uses."""
        pairs = [pair for kind in self.kinds.values() for pair in kind._chosen()]
        shared = {key: CORE_OPTIONS[key] for key in SHARED_OPTIONS}
        yield from dict.fromkeys([*pairs, *chosen_components(shared, self._values)])

    def _chosen(self) -> Iterator[tuple[str, Any]]:
        yield from chosen_components(CORE_OPTIONS, self._values)

    def sentences(self, method: str, *arguments) -> list[str]:
        """What a method of each component, such as `problems`, says on the layers that use it.

        arguments: those of the method after the config.
        """
        has_pattern = self.get('layer_pattern') is not None
        configs = self.kinds if has_pattern else {'': self, **self.kinds}
        letters: dict[str, dict[str, None]] = {}  # of each sentence, an ordered set
        for letter, config in configs.items():
            for _, component in config._chosen():
                for sentence in sentences_of(component, method, config, *arguments):
                    letters.setdefault(sentence, {})[letter] = None
        if not has_pattern:
            return list(letters)
        located: dict[str, list[str]] = {}  # the same, with the flags to type
        for sentence, of in letters.items():
            for letter in of:
                text = self._with_flags_of_kind(sentence, letter, is_alone=len(of) == 1)
                located.setdefault(text, []).append(letter)
        return [self._for_layers(of, sentence) for sentence, of in located.items()]

    def _with_flags_of_kind(self, sentence: str, letter: str, is_alone: bool) -> str:
        """The sentence with `--layer_kinds.L.KEY=` for `--KEY=` where the kind's value is meant.

        is_alone: whether the sentence is about no other kind.
        """
        if letter not in self._declared:
            return sentence
        _, kind = self._declared[letter]
        own = layer_options() if is_alone else kind.overrides
        return re.sub(
            r'--(\w+)=',
            lambda flag: f'--layer_kinds.{letter}.{flag[1]}=' if flag[1] in own else flag[0],
            sentence,
        )

    def _for_layers(self, letters: list[str], sentence: str) -> str:
        """The sentence, with the kinds of layers that it is about unless it is about all."""
        if {*letters} == self.kinds.keys():
            return sentence
        return f'layers {", ".join(letters)}: {sentence}'

    @property
    def name(self) -> str:
        """A readable name: sizes, then the tag of each chosen component that has one.

        With a layer pattern, tags that differ between kinds follow the pattern, by kind.
        """
        has_pattern = self.get('layer_pattern') is not None
        tags = {letter: kind._tags() for letter, kind in self.kinds.items()}
        if not has_pattern:
            tags = {'': self._tags()}
        heads, *common = (
            tag if all(tag in own for own in tags.values()) else ''
            for tag in next(iter(tags.values()))
        )
        sizes = filter(None, (f'{self.n_layer}L', heads, f'{self.n_embd}D'))
        parts = [*sizes, *filter(None, common)]
        if has_pattern:
            parts.append(pattern_tag(''.join(self.layer_letters)))
            for letter, own in tags.items():
                differing = [tag for tag in own if tag not in parts]
                parts += [f'{letter}({"+".join(differing)})'] if differing else []
        return '-'.join(parts)

    def _tags(self) -> list[str]:
        """The number of heads, and the tags of the components, of layers that are all alike."""
        parts = component_tags(self, list(self._chosen()))
        if self.get('document_mask') and 'DocMask' not in parts:
            parts.append('DocMask')  # without attention
        return [f'{self.n_head}H', *parts]

    def kinds_over_preset(self) -> dict[str, KindEntries]:
        """The kinds that give these layers if they are merged with the preset, with origins.

        A kind has the options that it sets, then others whose values differ from the model's.
        """
        kinds: dict[str, KindEntries] = {}
        for name, (config, kind) in self._declared.items():
            keys = [*kind.overrides, *self.layer_kinds[name]]
            kinds[name] = {
                key: (config.get(key), config.origins[key]) for key in keys if key in config
            }
        # What was removed from the preset.
        of_preset: Any = self.start.layer.values.get('layer_kinds', {})
        for name, entry in of_preset.items():
            if name not in kinds and name in letters_of(self.get('layer_pattern') or ''):
                kinds[name] = None
            elif (entries := kinds.get(name)) is not None:
                entries |= {key: (None, 'removed') for key in entry if key not in entries}
        return kinds

    def layer_lines(self) -> dict[str, list[str]]:
        """The lines of `layer_pattern` and `layer_kinds` in a config file with all options."""
        pattern = self.get('layer_pattern')
        if pattern is None:
            return {}
        origin, kinds = self.origins['layer_pattern'], self.kinds_over_preset()
        return config_lines(pattern, origin, self.layer_letters, kinds)

    @property
    def hash(self) -> str:
        """A hash, equal exactly if the resolved options of all layers are equal, on any device."""
        config = self.for_device('cpu')
        shared = shared_options(config._values)
        output = {key: value for key, value in config._values.items() if key in shared}
        return hash_of_layers([layer._values for layer in config.layers], output)

    def save(self, path: str | Path) -> None:
        """Write the options as JSON."""
        Path(path).write_text(json.dumps(self._values, indent=2) + '\n', encoding='utf-8')

    @classmethod
    def load(cls, path: str | Path) -> 'ModelArchitectureConfig':
        """Read what `save` wrote."""
        return cls.from_dict(parse_json(Path(path).read_bytes()))

    @classmethod
    def from_dict(cls, values: dict) -> 'ModelArchitectureConfig':
        """The architecture whose `to_dict()` is `values`, independent of presets.

        Options that are missing, because an older version saved the values, have their defaults;
        the sizes must be there. Raises UserError, which lists every problem.
        """
        problems: list[str] = []
        layer = layer_of_dict(values, 'from_dict()', schema(), problems)
        missing = [key for key in SIZES if key not in values]
        if missing:
            problems.append(
                f'from_dict(): {", ".join(missing)} missing. It takes all values of to_dict(); to '
                f'set some options only, call ModelArchitectureConfig(n_layer=2).'
            )
        config = cls.resolve([Layer('from_dict()', {'arch_preset': 'custom'}), layer], problems)
        if problems:
            raise UserError(*problems)
        return config


def layer_of_dict(values: object, origin: str, options: Schema, problems: list[str]) -> Layer:
    """The valid values of a dict such as `to_dict()` returns; others add to `problems`.

    Raises UserError if it is no dict of options.
    """
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(
            f'{origin} takes a dict, option -> value, such as to_dict() returns, and got '
            f'{show_value(values)}.'
        )
    values = {key: value for key, value in values.items() if key not in START_OPTIONS}
    return validate_layer(Layer(origin, values), options, problems)


def _layers_of_short_forms(
    config: ModelArchitectureConfig, stack: list[Layer]
) -> tuple[list[str], dict[str, ModelArchitectureConfig]]:
    """The letter of each layer, and the options of each kind, by the components' short forms."""
    letters, overrides = [], {}
    components = [component for _, component in config._chosen()]
    for number in range(config.n_layer):
        parts = [component.layer_overrides(config, number) for component in components]
        letter = ''.join(part for part, _ in parts)
        letters.append(letter)
        overrides[letter] = {key: value for _, own in parts for key, value in own.items()}
    if len(overrides) == 1 and not any(overrides.values()):
        return letters, dict.fromkeys(letters, config)
    above = len(stack) + 1
    return letters, {
        letter: ModelArchitectureConfig._of_merge(
            merge_kind(stack, [Layer('layer pattern', own, above)])
        )
        for letter, own in overrides.items()
    }


def _problems(config: ModelArchitectureConfig) -> list[str]:
    """The problems of the architecture as a whole, a sentence each."""
    problems = config.sentences('problems')
    for component in dict.fromkeys(component for _, component in config.components()):
        problems += sentences_of(component, 'model_problems', config)
    letters: dict[str, list[str]] = {}  # of each position encoding
    distinct = set()
    for letter, kind in config.kinds.items():
        if 'position_encoding' not in kind:
            continue
        letters.setdefault(kind.position_encoding, []).append(letter)
        distinct.add(POSITION_ENCODING_REGISTRY[kind.position_encoding].sharing_key(kind))
    for name, of in letters.items():
        reason = POSITION_ENCODING_REGISTRY[name].refused_in_kind(name)
        if len(distinct) > 1 and reason is not None:
            problems.append(config._for_layers(of, reason))
    return problems
