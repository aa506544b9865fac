"""Options of a run that optimizers and schedules read, without a command line."""

from types import SimpleNamespace

RUN = SimpleNamespace(
    decay_lr=True,
    lr_schedule='cosine',
    learning_rate=6e-4,
    min_lr=6e-5,
    warmup_iters=10,
    lr_decay_iters=100,
    optimizer='adamw',
    muon_momentum=0.95,
    muon_ns_steps=5,
    muon_adjust_lr_fn='match_rms_adamw',
    muon_learning_rate=6e-4,
    lion_beta1=0.9,
    lion_beta2=0.99,
    beta1=0.9,
    beta2=0.95,
    weight_decay=0.1,
    grad_clip=1.0,
    dtype='float32',
)


def options(**changed) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(RUN), **changed})
