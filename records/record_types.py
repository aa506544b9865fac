"""The objects of a run's record as types, one for each object of `record_schema.json`.

The schema has the meaning of each key; docs/record-format.md is generated from it. Keys that may be
missing, as in records of earlier versions, are in a base class.
"""

from collections.abc import Mapping
from typing import Any, TypedDict

# --- What a run begins with -----------------------------------------------------------------------


class LayerChoices(TypedDict):
    letters: list[str]
    kinds: dict[str, dict[str, Any]]


class _NewerArchitectureInfo(TypedDict, total=False):
    hash_version: int
    layers: LayerChoices | None


class ArchitectureInfo(_NewerArchitectureInfo):
    name: str
    hash: str
    choices: dict[str, Any]


class ConfigFile(TypedDict):
    path: str
    sha256: str
    text: str


class WeightsSource(TypedDict):
    source: str
    architecture: str
    files: dict[str, str]


class _NewerMetadata(TypedDict, total=False):
    code: dict[str, str]
    weights_from: WeightsSource | None


class RunMetadata(_NewerMetadata):
    seed: int
    data_seed: int
    strategy: str
    world_size: int
    job: str | None
    git_commit: str | None
    git_clean: bool | None
    versions: dict[str, str | None]
    command: str
    threads: int | None
    deterministic: bool
    platform: str
    config_files: list[ConfigFile]


class KindParameters(TypedDict):
    """The blocks of one kind of layers."""

    kind: str
    layers: int
    params: int
    active_params: int


class _NewerModelInfo(TypedDict, total=False):
    by_kind: list[KindParameters]


class ModelInfo(_NewerModelInfo):
    total_params: int
    active_params: int
    trainable_params: int
    non_embedding_params: int
    components: dict[str, int]


class KindFlops(TypedDict):
    """FLOPs of the blocks of one kind of layers."""

    kind: str
    per_token: float
    per_token_causal: float


class _NewerFlopsInfo(TypedDict, total=False):
    by_kind: list[KindFlops]


class FlopsInfo(_NewerFlopsInfo):
    per_token: float
    per_token_causal: float
    breakdown: dict[str, float]
    breakdown_causal: dict[str, float]
    attention_ffn_ratio: float | None
    elementwise_per_token: float | None
    recomputed_per_token: float


class OptimizerGroup(TypedDict):
    name: str
    rule: str
    tensors: int
    params: int
    weight_decay: float
    lr_scale: float


class OptimizerInfo(TypedDict):
    name: str
    options: dict[str, Any]
    learning_rate: float
    schedule: str
    schedule_options: dict[str, Any]
    weight_decay: float
    grad_clip: float | None
    groups: list[OptimizerGroup]


class HardwareInfo(TypedDict):
    device: str
    device_name: str | None
    world_size: int
    dtype: str
    peak_tflops: float | None
    peak_source: str | None
    threads: int | None
    expected_tokens_per_sec_at_50_mfu: float | None
    compile: bool
    activation_checkpointing: str | int


class MemoryFootprint(TypedDict):
    """What a rank holds; None before an update was logged."""

    parameter_bytes: int | None
    gradient_bytes: int | None
    optimizer_bytes: int | None


class ParallelInfo(MemoryFootprint):
    bytes_sent_per_update: float


class EvalWindows(TypedDict):
    train: int | None
    val: int | None


class _NewerDataInfo(TypedDict, total=False):
    train_documents: int | None
    val_documents: int | None
    windows_per_epoch: int | None
    planned_epochs: float
    planned_unique_tokens: int


class DataInfo(_NewerDataInfo):
    dataset: str
    path: str | None
    tokenizer: str | None
    vocab_size: int
    model_vocab_size: int
    train_tokens: int
    val_tokens: int
    train_sha256: str | None
    val_sha256: str | None
    train_bytes_per_token: float | None
    val_bytes_per_token: float | None
    batch_size: int
    gradient_accumulation_steps: int
    block_size: int
    tokens_per_iter: int
    eval_windows: EvalWindows


class _NewerStartupInfo(TypedDict, total=False):
    chosen: dict[str, str]


class StartupInfo(_NewerStartupInfo):
    model: ModelInfo
    flops: FlopsInfo
    optimizer: OptimizerInfo
    hardware: HardwareInfo
    parallel: ParallelInfo
    data: DataInfo
    derived: dict[str, Any]


class RecordHeader(TypedDict):
    """What a run's record begins with; the arguments of `TrainingLogger.start`."""

    config: dict[str, Any]
    architecture: ArchitectureInfo
    metadata: RunMetadata
    startup_info: StartupInfo


# --- What happens while it runs -------------------------------------------------------------------


class DataSeen(TypedDict):
    """How much of the data the updates up to an entry have met."""

    tokens_seen: int
    epochs: float | None
    unique_tokens: int | None


class PartialDataSeen(TypedDict, total=False):
    """The same as far as a record or a checkpoint of an earlier version has it."""

    tokens_seen: int
    epochs: float | None
    unique_tokens: int | None


class MfuInfo(TypedDict):
    mfu_percent: float | None
    mfu_causal_percent: float | None
    hfu_percent: float | None
    achieved_tflops: float | None
    hardware_peak_tflops: float | None
    flops_per_token: float | None
    architecture: str


class _NewerMemoryInfo(TypedDict, total=False):
    reserved_peak_gb: float | None
    allocator_retries: int | None


class MemoryInfo(_NewerMemoryInfo):
    allocated_gb: float | None
    peak_gb: float | None
    reserved_gb: float | None
    rss_gb: float | None


class GradientInfo(TypedDict):
    norm: float | None
    mean: float | None
    std: float | None


class _NewerIterationEntry(TypedDict, total=False):
    epochs: float | None
    unique_tokens: int | None


class IterationEntry(_NewerIterationEntry):
    iter: int
    loss: float | None
    lr: float | None
    time_ms: float | None
    steps: int
    tokens_per_sec: float | None
    tokens_seen: int
    mfu: MfuInfo
    memory: MemoryInfo
    gradients: GradientInfo
    loss_scale: float | None
    readings: Mapping[str, float | None]


class LayerDiagnostics(TypedDict):
    layer: int
    activation_rms: float | None
    gradient_norm: float | None
    max_attention_logit: float | None


# 'from' is a word of Python's own: no name of an attribute.
PositionLoss = TypedDict('PositionLoss', {'from': int, 'to': int, 'loss': float | None})


class Diagnostics(TypedDict):
    layers: list[LayerDiagnostics]
    update_to_weight: Mapping[str, float | None]
    val_loss_by_position: list[PositionLoss]


class Sample(TypedDict):
    prompt: str
    text: str | None
    time_ms: float


class _OptionalEvaluationEntry(PartialDataSeen, total=False):
    train_seconds: float | None
    data_hash: str | None
    diagnostics: Diagnostics
    sample: Sample


class EvaluationEntry(_OptionalEvaluationEntry):
    iter: int
    train_loss: float | None
    val_loss: float | None
    val_bits_per_byte: float | None
    lr: float | None
    time_ms: float | None


class CheckpointEntry(PartialDataSeen):
    iter: int
    val_loss: float | None
    path: str
    time_ms: float | None
    write_ms: float | None


class _OptionalEvent(TypedDict, total=False):
    message: str
    count: int
    from_iter: int
    checkpoint: str
    command: str
    changed: dict[str, list]
    id: str


class Event(_OptionalEvent):
    """An event may have keys of its own kind beside these."""

    event: str
    iter: int | None
    time: float


# --- What came of it ------------------------------------------------------------------------------


class _NewerSummary(TypedDict, total=False):
    train_seconds: float | None
    epochs: float | None
    unique_tokens: int | None
    gradient_growth: float | None


class Summary(_NewerSummary):
    total_iterations: int | None
    final_iter: int
    final_train_loss: float | None
    best_val_loss: float | None
    final_val_loss: float | None
    val_bits_per_byte: float | None
    avg_mfu: float | None
    avg_time_ms: float | None
    total_tokens: int | None
    total_flops: float | None
    wall_seconds: float
    peak_memory_gb: float | None
    nonfinite_updates: int
    loss_spikes: int


class Record(RecordHeader):
    """The whole of record.json."""

    schema_version: int
    run_name: str
    start_time: str
    end_time: str | None
    status: str
    training_iterations: list[IterationEntry]
    eval_steps: list[EvaluationEntry]
    checkpoints: list[CheckpointEntry]
    events: list[Event]
    summary: Summary


# A line of journal.jsonl: an entry of one of these shapes with its `kind` and `time`.
JournalLine = dict[str, Any]
