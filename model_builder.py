"""Build a transformer from its config; count its parameters and FLOPs; group its parameters.

config = ModelArchitectureConfig(arch_preset='llama', vocab_size=50304)
model = build_model(config)                       # on the meta device, without memory
model = build_model(config, device='cpu', seed=1337)
logits = model(tokens)                            # (B, T) -> (B, T, V)
loss_sum, count, aux = model(tokens, targets)
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from common.errors import UserError
from common.hardware import compile_problem
from components.checks import check_built, check_form, flops_disagreements, observe_calls
from components.element_counter import ElementCounter
from components.faults import is_foreign
from components.layer_counts import flops_by_kind, inactive_params, parameters_by_kind
from components.layer_inputs import (
    LayerNeeds,
    layer_inputs,
    merge_aux,
    position_encodings,
    publish_first_values,
    run_block,
    shared_inputs,
    summarize_metrics,
)
from components.layout_checks import checked_layouts
from components.weight_initialization import initialize
from data.dataset import TokenDataset
from model_components import (
    AttentionInputs,
    Cache,
    Component,
    Documents,
    LayerCache,
    OutputHead,
    PositionEncoding,
    TokenEmbedding,
    locate_documents,
    module_flops,
)
from model_config import (
    ATTENTION_BACKEND_REGISTRY,
    INITIALIZATION_REGISTRY,
    NORM_POSITION_REGISTRY,
    NORM_REGISTRY,
    ModelArchitectureConfig,
)
from records.record_types import FlopsInfo, ModelInfo

# Vocabulary size without data: GPT-2's 50,257 tokens, padded to a multiple of 64.
ASSUMED_VOCABULARY = 50304


class Transformer(nn.Module):
    """A decoder-only language model: embedding, blocks, final norm if the layout has one, head.

    Written for a single device and independent of the training.
    """

    def __init__(self, config: ModelArchitectureConfig):
        super().__init__()
        self.config = config
        # If set, attention does not cross the end of a document.
        self.end_of_text = config.end_of_text if 'end_of_text' in config else None
        layouts = [NORM_POSITION_REGISTRY[layer.norm_position] for layer in config.layers]
        norm = NORM_REGISTRY[config.normalization]
        self.token_embedding = TokenEmbedding(config)
        self.embedding_norm = NORM_REGISTRY[config.embedding_norm](config, config.n_embd)
        encodings, self.encoding_numbers = position_encodings(config)
        # The names of the first one's parameters are those of models with a single one.
        self.position_encoding = encodings[0] if encodings else None
        self.more_position_encodings = nn.ModuleList(encodings[1:])
        self.dropout = nn.Dropout(config.dropout)
        blocks = [
            layout(layer, number)
            for number, (layout, layer) in enumerate(zip(layouts, config.layers))
        ]
        self.blocks = nn.ModuleList(blocks)
        check_built(self.blocks)  # before a component is asked what it needs
        publish_first_values(self.blocks, config)
        final_norm = layouts[-1].final_norm
        self.final_norm = norm(config, config.n_embd) if final_norm else nn.Identity()
        self.output_head = OutputHead(config)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Share the embedding's weight with the head if the config says so; repeat after
        `to_empty`.
        """
        if self.config.weight_tying:
            self.output_head.projection.weight = self.token_embedding.weight

    def forward(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor | None = None,
        last_only: bool = False,
        cache: Cache | None = None,
    ):
        """tokens (B, T) -> logits (B, T, V), or (B, 1, V) with `last_only`.

        With a cache from `empty_cache`, the tokens continue those of earlier calls.

        With `document_mask`, only tokens of the same document are visible, and absolute positions
        count from its beginning.

        With targets (B, T), -100 for none: the summed loss in nats, the number of targets, and an
        AuxOutput with the auxiliary loss of blocks and head, a mean over the batch that is not part
        of the reported loss, and metrics of shape (layers, ...).
        """
        first = cache.length if cache else 0
        end, longest = first + tokens.size(1), self.max_length
        if longest is not None and end > longest:
            lengths = [encoding.max_length for encoding in self.position_encodings]
            layer = self.encoding_numbers.index(lengths.index(longest))
            raise UserError(
                f'sequence length {end} exceeds block_size={longest}, and position_encoding='
                f'{self.config.layers[layer].position_encoding!r} cannot extrapolate. Shorten the '
                f'sequence.'
            )
        # Positions in the text, and in each token's document if masks depend on documents.
        pos = doc_positions = torch.arange(first, end, device=tokens.device)
        documents = None
        if self.end_of_text is not None:
            text = cache.text.extend(tokens[..., None])[0][..., 0] if cache else tokens
            documents = locate_documents(text, self.end_of_text)
            doc_positions = documents.positions[:, first:]
        attn_inputs = self.attention_inputs(pos, documents, cache)

        # Embedding, then the blocks, each with its auxiliary output.
        x = self.embedding_norm(self.token_embedding(tokens))  # (B, T, C)
        for encoding in self.position_encodings:
            x = encoding.embed(x, doc_positions)
        x = self.dropout(x)
        # No name for x0, which would keep it in memory if no block asks for it.
        shared = shared_inputs(self.blocks, tokens=tokens, x0=x, positions=doc_positions)
        aux_outputs = []
        for block, block_inputs in zip(self.blocks, attn_inputs):
            x, aux, shared = run_block(block, x, block_inputs, shared)
            aux_outputs.append(aux)
        if cache:
            cache.length = end

        # Logits, or the loss.
        if targets is None:
            return self.output_head(self.final_norm(x[:, -1:] if last_only else x))
        loss, count, aux = self.output_head(self.final_norm(x), targets)
        return loss, count, merge_aux([*aux_outputs, aux])

    @property
    def position_encodings(self) -> list[PositionEncoding]:
        """The position encodings; layers share one if they have the same options of it. None
        without attention."""
        if self.position_encoding is None:
            return []
        return [self.position_encoding, *self.more_position_encodings]

    @property
    def max_length(self) -> int | None:
        """The longest sequence that the position encodings support; None: any length."""
        lengths = [encoding.max_length for encoding in self.position_encodings]
        return min((length for length in lengths if length is not None), default=None)

    def attention_inputs(
        self,
        pos: torch.Tensor,
        documents: Documents | None = None,
        cache: Cache | None = None,
    ) -> list[AttentionInputs]:
        """Inputs of each block's mixers for positions (T,).

        documents: of each token so far, (B, all), if they are kept apart.
        """
        backend = self.config.get('attention_backend')
        encodings, needs = self.position_encodings, []
        for block, number in zip(self.blocks, self.encoding_numbers):
            spec = None if block.attention is None else block.attention.spec
            encoding = None if number is None else encodings[number]
            needs.append(LayerNeeds(spec, encoding, bool(block.mixers or block.canon)))
        registry = ATTENTION_BACKEND_REGISTRY
        return layer_inputs(backend and registry[backend], needs, pos, documents, cache)

    def empty_cache(self, tokens: int) -> Cache:
        """A cache for all `forward` calls of one batch of sequences of at most `tokens` tokens."""
        return Cache([block.empty_cache(tokens) for block in self.blocks], LayerCache(tokens))

    @property
    def uncacheable(self) -> list[str]:
        """Names of the components without cache support, because of which the model has none."""
        components = [module for module in self.modules() if isinstance(module, Component)]
        return sorted({type(module).__name__ for module in components if not module.cacheable})

    def summarize_metrics(self, means: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Metrics for the record, from those averaged over micro-batches."""
        of_head = {n: mean.mean() for n, mean in means.items() if n in OutputHead.metric_names}
        of_blocks = {n: mean for n, mean in means.items() if n not in of_head}
        return {**summarize_metrics(self.blocks, of_blocks), **of_head}


def complete(architecture: ModelArchitectureConfig) -> ModelArchitectureConfig:
    """The architecture, with assumed values for those that only a dataset gives.

    FLOPs and memory depend on the vocabulary size, and not on the token that ends a document.
    """
    if architecture.vocab_size is None:
        architecture = architecture.replace(vocab_size=ASSUMED_VOCABULARY)
    if 'end_of_text' in architecture and architecture.end_of_text is None:
        architecture = architecture.replace(end_of_text=0)
    return architecture


def with_vocabulary(
    architecture: ModelArchitectureConfig, dataset: TokenDataset, name: str, derived: dict[str, str]
) -> ModelArchitectureConfig:
    """The architecture with the dataset's vocab_size, noted in `derived`, unless it is set.

    Raises UserError if it is too small.
    """
    needed, padded = dataset.vocab_size, dataset.padded_vocab_size
    if architecture.vocab_size is None:
        architecture = architecture.replace(vocab_size=padded)
        architecture.origins['vocab_size'] = 'dataset'
        padding = ', padded to a multiple of 64' if padded != needed else ''
        derived['vocab_size'] = f"{padded:,} (the dataset's {needed:,}{padding})"
    elif architecture.vocab_size < needed:
        raise UserError(
            f'vocab_size={architecture.vocab_size} ({architecture.origins["vocab_size"]}) is too '
            f'small: the dataset {name!r} has tokens up to {needed - 1}, so at least {needed} is '
            f'needed. Set --vocab_size={padded}.'
        )
    return architecture


def with_end_of_text(
    architecture: ModelArchitectureConfig, dataset: TokenDataset, name: str
) -> ModelArchitectureConfig:
    """The architecture with the dataset's end-of-text token, if it needs one. Raises UserError."""
    if 'end_of_text' not in architecture:
        return architecture
    if architecture.end_of_text is None:
        if dataset.end_of_text is None:
            raise UserError(
                f'document_mask=True: the documents of the dataset {name!r} are not marked, since '
                f'its meta.json has no end_of_text. Set the token that ends a document '
                f'(--end_of_text=ID), prepare the data with documents, or remove document_mask.'
            )
        architecture = architecture.replace(end_of_text=dataset.end_of_text)
        architecture.origins['end_of_text'] = 'derived: from the dataset'
    if architecture.end_of_text >= dataset.vocab_size:
        raise UserError(
            f'end_of_text={architecture.end_of_text}: the dataset {name!r} has tokens up to '
            f'{dataset.vocab_size - 1} only, so that no token would end a document. Set another '
            f'--end_of_text.'
        )
    return architecture


def build_model(
    config: ModelArchitectureConfig,
    device: str | torch.device = 'meta',
    seed: int | None = None,
) -> Transformer:
    """The model of `config`; on a real device its parameters are initialized from `seed`.

    Raises UserError if a size exceeds the limits of tensors.
    """
    config = with_backend_of(torch.device(device), config)
    for key in ('vocab_size', 'end_of_text'):
        if key in config and getattr(config, key) is None:
            raise UserError(f'{key} is not set. Set it, or take it from a dataset.')
    try:
        with torch.device('meta'):
            model = Transformer(config)
    except (RuntimeError, OverflowError, TypeError) as error:
        if 'overflow' not in str(error).lower():
            raise
        sizes = {
            key if options is config else f'layer_kinds.{letter}.{key}': value
            for letter, options in {**config.kinds, '': config}.items()
            for key, value in options.to_dict().items()
            if type(value) is int and (options is config or value != config.get(key))
        }
        largest = sorted(sizes, key=sizes.__getitem__)[-3:]
        shown = ', '.join(f'{key}={sizes[key]:,}' for key in reversed(largest))
        raise UserError(
            f'no tensor can be as large as this model needs: {shown}. Reduce a size.'
        ) from error
    check_built(model)
    if torch.device(device).type != 'meta':
        model.to_empty(device=device)
        model.tie_weights()
        initialize(model, 0 if seed is None else seed)
    return model


def with_backend_of(
    device: torch.device, config: ModelArchitectureConfig
) -> ModelArchitectureConfig:
    """The config with the attention backend of this machine's device, unless one was set."""
    if device.type == 'meta':
        return config
    compiles = device.type != 'cuda' or compile_problem(device) is None
    return config.for_device(device.type, compiles)


# --------------------------------------------------------------------------------------------------
# Counting


def parameter_parts(model: Transformer) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(name, part, parameter) of every parameter; tied parameters once.

    The part is that of the innermost enclosing component with a `part`.
    """
    parts = {
        prefix: module.part
        for prefix, module in model.named_modules()
        if isinstance(module, Component) and module.part
    }
    for name, parameter in model.named_parameters():
        prefix = name
        while prefix and prefix not in parts:
            prefix = prefix.rpartition('.')[0]
        yield name, parts.get(prefix, 'other'), parameter


def count_parameters(model: Transformer) -> ModelInfo:
    """The record's `startup_info.model`: totals, and the count of each part.

    `active_params` are used for each token. `non_embedding_params` excludes position embeddings,
    and token embeddings that are not shared with the head.
    """
    components: dict[str, int] = {}
    for _, part, parameter in parameter_parts(model):
        components[part] = components.get(part, 0) + parameter.numel()
    total = sum(parameter.numel() for parameter in model.parameters())
    assert sum(components.values()) == total, 'the parts must add up to the total'
    embedding = components.get('position_encoding', 0)
    if not model.config.weight_tying:
        embedding += components['token_embedding']
    return {
        'total_params': total,
        'active_params': total - inactive_params(model),
        'trainable_params': sum(p.numel() for p in model.parameters() if p.requires_grad),
        'non_embedding_params': total - embedding,
        'components': components,
        'by_kind': parameters_by_kind(model.config.layer_letters, model.blocks),
    }


def training_flops(model: Transformer, recomputed_blocks: list[int] | None = None) -> FlopsInfo:
    """The record's `startup_info.flops`: training FLOPs per token, in both conventions.

    Matrix multiplications of the forward pass, and twice that for the backward pass. `per_token`
    counts attention over the full square, whatever its windows (Chowdhery et al. 2022, appendix B,
    as in nanoGPT and torchtitan), `per_token_causal` only visible pairs. The recomputation of
    `recomputed_blocks` is separate and in neither.
    """
    length = model.config.block_size
    full, causal = (flops_by_part(model, half) for half in (False, True))
    attention = causal.get('attention_projections', 0) + causal.get('attention_scores', 0)
    return {
        'per_token': sum(full.values()),
        'per_token_causal': sum(causal.values()),
        'breakdown': full,
        'breakdown_causal': causal,
        'attention_ffn_ratio': attention / causal['ffn']
        if attention and causal.get('ffn')
        else None,
        'elementwise_per_token': elementwise_operations(model.config) / length,
        'recomputed_per_token': (
            recomputed_flops(model.config, recomputed_blocks) / length if recomputed_blocks else 0.0
        ),
        'by_kind': flops_by_kind(model.config.layer_letters, model.blocks, length),
    }


def flops_by_part(model: Transformer, causal: bool) -> dict[str, float]:
    """Training FLOPs per token in matrix multiplications: 3 times those of the forward pass."""
    length = model.config.block_size
    forward = module_flops(model, length, causal, 'other')
    return {part: 3.0 * flops / length for part, flops in forward.items()}


def recompute(block: nn.Module) -> None:
    """Make the block keep only its input, and recompute the rest in the backward pass."""
    forward = block.forward

    def recomputed(*arguments):  # a function, since torch.compile skips torch's `checkpoint`
        return checkpoint(forward, *arguments, use_reentrant=False)

    block.forward = recomputed


def recomputed_flops(config: ModelArchitectureConfig, blocks: list[int]) -> int:
    """Matrix-multiplication FLOPs per sequence that the recomputation of those blocks adds.

    Counted by running a sequence on the meta device. The count is less than a forward pass: torch
    stops once it has everything for the backward pass, before a product at the end of a block.
    """
    config = config.with_backend('manual')
    tokens = torch.empty((1, config.block_size), dtype=torch.long, device='meta')
    flops = []
    for recomputed in (blocks, []):
        model = build_model(config)
        for number in recomputed:
            recompute(model.blocks[number])
        with FlopCounterMode(display=False) as counter:
            model(tokens).sum().backward()
        flops.append(counter.get_total_flops())
    return flops[0] - flops[1]


def elementwise_operations(config: ModelArchitectureConfig) -> int:
    """Elements that the forward pass of a sequence writes outside matrix multiplications.

    Counted by running the model on the meta device with manual attention, so that norms, gates,
    rotations and softmax are included.
    """
    model = build_model(config.with_backend('manual')).eval()
    tokens = torch.empty((1, config.block_size), dtype=torch.long, device='meta')
    with torch.no_grad(), ElementCounter() as counter:
        model(tokens)
    return counter.elements


def check_calls(config: ModelArchitectureConfig) -> None:
    """Raise UserError if a method of a user's component returns a wrong type or shape.

    Values that come from a dataset may be unset. Tests check the project's own components.
    """
    if not _has_foreign_components(config):
        return
    data_values = {'vocab_size': 64, 'end_of_text': 0}
    missing = {k: v for k, v in data_values.items() if k in config and config.get(k) is None}
    model = build_model(config.replace(**missing).with_backend('manual')).eval()
    tokens = torch.empty((2, min(8, config.block_size)), dtype=torch.long, device='meta')
    with torch.no_grad(), observe_calls(model, check_form), checked_layouts(model):
        model(tokens)


def _has_foreign_components(config: ModelArchitectureConfig) -> bool:
    return any(is_foreign(component) for _, component in config.components())


def flops_notes(config: ModelArchitectureConfig) -> list[str]:
    """Notes on users' components whose `flops()` differs from PyTorch's count."""
    if not _has_foreign_components(config):
        return []
    return flops_disagreements(build_model(config.with_backend('manual')).eval())


class ParameterGroup(NamedTuple):
    """Parameters with the same optimizer settings."""

    name: str
    parameters: list[nn.Parameter]
    decayed: bool
    # For hidden matrices: the rows of each matrix that is stacked in each parameter.
    rows: list[tuple[int, ...]] | None = None
    lr_scale: float = 1.0  # factor of the run's learning rate


def parameter_groups(model: nn.Module) -> list[ParameterGroup]:
    """Hidden matrices and embeddings have weight decay; norms and biases do not (as in nanoGPT).

    The names of the groups are part of checkpoints.
    """
    components = [module for module in model.modules() if isinstance(module, Component)]
    matrices = {p: rows for each in components for p, rows in each.matrices().items()}
    undecayed = {parameter for each in components for parameter in each.undecayed()}
    initialization = INITIALIZATION_REGISTRY[model.config.initialization]
    lr_scale = initialization.hidden_lr_scale(model.config)
    all_rows: list[tuple[int, ...]] = []
    hidden = ParameterGroup('matrices', [], True, rows=all_rows, lr_scale=lr_scale)
    embeddings = ParameterGroup('tables', [], True)
    vectors = ParameterGroup('gains and biases', [], False)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter in matrices:
            rows = matrices[parameter]
            assert sum(rows) == parameter.shape[-2], (rows, parameter.shape)
            hidden.parameters.append(parameter)
            all_rows.append(rows)
        else:
            decayed = parameter.dim() >= 2 and parameter not in undecayed
            (embeddings if decayed else vectors).parameters.append(parameter)
    return [group for group in (hidden, embeddings, vectors) if group.parameters]
