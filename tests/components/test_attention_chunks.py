"""attention_chunk: against a mask in plain PyTorch, with caches and documents."""

import pytest
import torch
from helpers.architectures import gradients, perturbed_model, random_tokens, tiny

from common.errors import UserError
from components.document_mask import locate_documents
from inference.generate import generate
from model_builder import build_model, training_flops

pytestmark = pytest.mark.usefixtures('one_thread')
CHUNKS = {'attention_chunk': 4, 'position_encoding': 'rope', 'block_size': 11}
GLOBAL = {'attention_chunk': None, 'position_encoding': 'none'}
MIXED = {**CHUNKS, 'n_layer': 4, 'layer_pattern': 'CCCG', 'layer_kinds': {'G': GLOBAL}}
END = 3
MASKED = {'document_mask': True, 'end_of_text': END}
# The second document of the first text begins within a chunk of the text, and has two of its own.
TEXTS = torch.tensor([[1, 2, END, 4, 5, 6, 7, 8, 9, 1, 2], [5, 4, 2, 1, 6, 7, 8, 9, 10, END, 1]])


def reference_mask(tokens: torch.Tensor, chunk: int | None, documents: bool) -> torch.Tensor:
    """Whether keys are visible to queries, (B, 1, T, T), by a loop over all pairs."""
    visible = torch.zeros(len(tokens), 1, tokens.size(1), tokens.size(1), dtype=torch.bool)
    for row, text in enumerate(tokens.tolist()):
        for query in range(len(text)):
            ends = [t + 1 for t in range(query) if text[t] == END] if documents else []
            begin = max([0, *ends])
            if chunk is not None:
                begin += (query - begin) // chunk * chunk
            visible[row, 0, query, begin : query + 1] = True
    return visible


def use_reference(model, tokens, documents):
    """Let each attention of the model use scores of all pairs and the mask of its layer."""
    for block, layer in zip(model.blocks, model.config.layers):
        visible = reference_mask(tokens, layer.attention_chunk, documents)

        def attend(q, k, v, mask, spec, dropout, visible=visible):
            k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))
            scores = spec.scale * q @ k.transpose(-1, -2)
            return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v

        block.attention.attend = attend
    return model


CASES = {
    'chunks': {},
    'one token': {'attention_chunk': 1},
    'longer than the text': {'attention_chunk': 20},
    'groups': {'use_gqa': True, 'num_kv_heads': 2},
    'latents': {'attention_type': 'mla', 'qk_rope_head_dim': 4},
    'by layer': MIXED,
}


@pytest.mark.parametrize('documents', [False, True], ids=['', 'documents'])
@pytest.mark.parametrize('backend', ['sdpa', 'manual'])
@pytest.mark.parametrize('case', CASES)
def test_chunks_equal_a_plain_mask(case, backend, documents):
    values = {**CHUNKS, **CASES[case], **(MASKED if documents else {})}
    config = tiny(**values, attention_backend=backend)
    outputs, grads = [], []
    for reference in (False, True):
        model = perturbed_model(config, factor=3.0)
        if reference:
            use_reference(model, TEXTS, documents)
        outputs.append(model(TEXTS))
        model(TEXTS, TEXTS.roll(-1, dims=1))[0].backward()
        grads.append(gradients(model))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.usefixtures('flex_of_few_queries')
@pytest.mark.parametrize('documents', [False, True], ids=['', 'documents'])
@pytest.mark.parametrize(('chunk', 'length'), [(4, 11), (100, 300), (128, 300)])
def test_flex_equals_manual(chunk, length, documents):
    """Blocks of 128 positions, of which chunks cut some; a batch of two texts."""
    torch._dynamo.reset()
    values = {**MIXED, **(MASKED if documents else {}), 'block_size': length}
    config = tiny(**{**values, 'attention_chunk': chunk, 'vocab_size': 99})
    tokens = random_tokens(config, batch=2)
    logits = [
        perturbed_model(config.replace(attention_backend=backend), factor=3.0)(tokens)
        for backend in ('flex', 'manual')
    ]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize('documents', [False, True], ids=['', 'documents'])
@pytest.mark.parametrize('backend', ['sdpa', 'manual', 'flex'])
@pytest.mark.parametrize('attention', ['standard', 'mla'])
def test_chunks_continue_from_a_cache(attention, backend, documents):
    """Whatever the pieces; the cache keeps no more than a chunk."""
    values = {**MIXED, **(MASKED if documents else {}), 'attention_type': attention}
    values |= {'qk_rope_head_dim': 4} if attention == 'mla' else {}
    model = perturbed_model(tiny(**values, attention_backend=backend), factor=3.0).eval()
    expected = model(TEXTS)
    for sizes in ([1] * 11, [3, 3, 3, 2], [6, 5], [2, 9], [10, 1], [4, 1, 1, 1, 1, 3]):
        cache = model.empty_cache(11)
        logits = [model(piece, cache=cache) for piece in TEXTS.split(sizes, dim=1)]
        torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-4, atol=1e-4)
        capacities = [states['attention'].capacity for states in cache.layers]
        assert capacities == [4, 4, 4, 11]


@pytest.mark.parametrize('prompt', [1, 5, 11, 13])
def test_text_with_and_without_a_cache(prompt):
    """Also beyond the context, whose oldest token drops out then."""
    model = perturbed_model(tiny(**MIXED)).eval()
    tokens = TEXTS.repeat(1, 2)[:, :prompt]
    texts = [
        torch.stack(list(generate(model, tokens, 14, choose=lambda x: x.argmax(-1), cache=cache)))
        for cache in (True, False)
    ]
    assert torch.equal(*texts) and len(texts[0].unique()) > 1


@pytest.mark.parametrize('chunk', [1, 4, 5, 11, 20])
def test_flops_count_the_pairs_within_chunks(chunk):
    flops, plain = (
        training_flops(build_model(tiny(**{**CHUNKS, 'attention_chunk': each})))
        for each in (chunk, None)
    )
    # Pairs on the diagonal count half, as without chunks.
    pairs = reference_mask(torch.zeros(1, 11).long(), chunk, False).sum().item() - 11 / 2
    share = flops['breakdown_causal']['attention_scores']
    whole = plain['breakdown_causal']['attention_scores']
    assert share / whole == pytest.approx(pairs / (11**2 / 2))
    assert flops['breakdown'] == plain['breakdown']


def test_documents_restart_chunks():
    located = locate_documents(TEXTS, END)
    assert located.positions[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7]
    visible = reference_mask(TEXTS, 4, True)[0, 0].sum(-1)
    assert visible.tolist() == [1, 2, 3, 1, 2, 3, 4, 1, 2, 3, 4]


def test_name_hash_and_backend():
    config = tiny(attention_chunk=4)
    assert '-Chunk4-' in config.name and config.hash != tiny().hash
    assert tiny(attention_chunk=None).hash == tiny().hash
    assert config.for_device('cpu', compiles=True).attention_backend == 'sdpa'
    wide = tiny(attention_chunk=4, n_embd=64)  # flex needs heads of 16
    assert wide.for_device('cuda', compiles=True).attention_backend == 'flex'


@pytest.mark.parametrize(
    'values',
    [
        {'sliding_window': 4},
        {'layer_pattern': 'AB', 'layer_kinds': {'B': {'sliding_window': 2, 'attention_chunk': 4}}},
        {'mixer': 'gla'},
    ],
)
def test_useless_chunks_are_refused(values):
    with pytest.raises(UserError, match=r'attention_chunk=4 .*needs ') as refused:
        tiny(**{'attention_chunk': 4, **values})
    assert len(refused.value.problems) == 1
