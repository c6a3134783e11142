"""Inference ops on a GPU: the bits of the CPU, no waiting, few launches, little memory."""

import pytest
import torch

from benchmarks.measure import captured
from fcos_d2.ops import backend, batched_nms, batched_nms_padded, make_levels, select_candidates

from . import inputs
from .gpu import forbidden_to_wait, results_on_streams

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.parametrize("implementation", ["compiled"], indirect=True),
    pytest.mark.skipif(
        backend()["select_candidates"]["CUDA"] != "compiled",
        reason="fcos_d2/_C_cuda.so is not built",
    ),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
LEVELS = inputs.pyramid(256, 320, 4)
STANDARD = make_levels([(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)], (8, 16, 32, 64, 128))


def head_outputs(levels=LEVELS, images=2, dtype=torch.bfloat16, prior=-3.0, channels_last=False):
    """(logits, ltrb, quality, image sizes) on the CPU."""
    maps = inputs.predictions(levels, images, 80, dtype, prior=prior, channels_last=channels_last)
    return *maps, torch.tensor([[250, 300]] * images)


def to_gpu(head):
    return *([level.cuda() for level in maps] for maps in head[:3]), head[3].cuda()


def select(head, levels=LEVELS, **options):
    return select_candidates(*head[:3], levels, head[3], **options)


def detect(head, levels=LEVELS):
    return batched_nms_padded(*select(head, levels))


def assert_same_bits(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs.cpu(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("prior", [-9.0, -3.0, 5.0, 25.0])
@pytest.mark.parametrize("topk", [1, 100, 1000, 5000])
def test_candidates_have_the_bits_of_the_cpu(dtype, channels_last, prior, topk):
    head = head_outputs(dtype=dtype, prior=prior, channels_last=channels_last)
    assert_same_bits(select(to_gpu(head), topk=topk), select(head, topk=topk))


@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_candidates_that_are_all_equal(threshold):
    head = head_outputs()
    for maps in (head[0], head[2]):
        for level in maps:
            level.fill_(0.3)
    options = {"score_threshold": threshold, "clip": True}
    assert_same_bits(select(to_gpu(head), **options), select(head, **options))


def random_boxes(images, count, num_classes):
    boxes = torch.stack([inputs.boxes(count) for _ in range(images)])
    scores = (torch.rand(images, count) * 2000).round() / 2000  # some are equal
    return boxes, scores, torch.randint(-1, num_classes, (images, count))


@pytest.mark.parametrize("method", ["hard", "linear", "gaussian"])
@pytest.mark.parametrize("class_agnostic", [False, True])
@pytest.mark.parametrize("detections", [1, 100, 3000])
def test_detections_have_the_bits_of_the_cpu(method, class_agnostic, detections):
    batch = random_boxes(3, 2500, 20)
    options = {"method": method, "class_agnostic": class_agnostic}
    found = batched_nms_padded(*(x.cuda() for x in batch), 0.6, detections, **options)
    assert_same_bits(found, batched_nms_padded(*batch, 0.6, detections, **options))


@pytest.mark.parametrize("count, groups", [(0, 1), (1, 1), (1000, 80), (20_000, 80), (20_000, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_indices_are_those_of_the_cpu(count, groups, dtype):
    boxes, scores, classes = (x[0] for x in random_boxes(1, count, groups))
    boxes, scores = boxes.to(dtype), scores.to(dtype)
    kept = batched_nms(boxes.cuda(), scores.cuda(), classes.cuda(), 0.5)
    assert torch.equal(kept.cpu(), batched_nms(boxes, scores, classes, 0.5))


def test_every_run_gives_the_same_bits():
    head = to_gpu(head_outputs(prior=5.0))
    expected = detect(head)
    for _ in range(100):
        assert_same_bits(detect(head), expected)


@pytest.mark.parametrize("prior", [-3.0, 25.0])
def test_nothing_waits_for_the_device(prior):
    head = to_gpu(head_outputs(prior=prior))
    detect(head)  # loads the kernels
    with forbidden_to_wait():
        detect(head)
        batched_nms_padded(*select(head), method="gaussian")


def test_flat_form_waits_once():
    boxes, scores, classes = (x[0].cuda() for x in random_boxes(1, 500, 80))
    batched_nms(boxes, scores, classes, 0.5)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchroniz") as warnings:
            batched_nms(boxes, scores, classes, 0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in warnings if "synchroniz" in str(w.message)]) == 1


def test_cuda_graph_follows_its_inputs():
    head = to_gpu(head_outputs(prior=-9.0))
    graph, found = captured(lambda: detect(head))
    for prior in (-3.0, 25.0, -9.0, 0.0):  # few candidates, all, none that were there before
        changed = to_gpu(head_outputs(prior=prior))
        for maps, new in zip(head[:3], changed[:3], strict=True):
            for level, values in zip(maps, new, strict=True):
                level.copy_(values)
        graph.replay()
        assert_same_bits(found, detect(changed))


def test_two_streams_do_not_disturb_each_other():
    heads = [to_gpu(head_outputs(images=4, prior=prior)) for prior in (-3.0, 25.0)]
    boxes = [x[0].cuda() for x in random_boxes(1, 5000, 3)]
    calls = [lambda head=head: (*detect(head), batched_nms(*boxes, 0.5)) for head in heads]
    expected = [call() for call in calls]
    for found in results_on_streams(calls, rounds=20):
        for got, want in zip(found, expected, strict=True):
            assert_same_bits(got, want)


def test_post_processing_takes_five_launches():
    head = to_gpu(head_outputs(STANDARD))
    detect(head, STANDARD)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        detect(head, STANDARD)
        torch.cuda.synchronize()
    on_device = [
        e.name for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA
    ]
    assert len(on_device) <= 5, on_device


@pytest.mark.parametrize("prior", [-5.0, 25.0])
def test_peak_memory_is_a_twentieth_of_the_head_outputs(prior):
    head = to_gpu(head_outputs(STANDARD, images=16, prior=prior))
    size = sum(level.nbytes for maps in head[:3] for level in maps)
    detect(head, STANDARD)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    detect(head, STANDARD)
    assert torch.cuda.max_memory_allocated() - before <= 0.05 * size


def test_more_elements_than_32_bits_count():
    """1203 classes of 128 images: 3.4e9 logits."""
    if torch.cuda.mem_get_info()[0] < 10 << 30:
        pytest.skip("needs 10 GB")
    levels = make_levels([(100, 168), (50, 84)], (8, 16))
    logits = [
        torch.full((128, 1203, h, w), -9.0, dtype=torch.half, device="cuda")
        for h, w in levels.shapes
    ]
    logits[0][-1, -1, -1, -1] = logits[1][-1, -1, -1, -1] = 3
    ltrb = [torch.ones(128, 4, h, w, device="cuda") for h, w in levels.shapes]
    quality = [torch.zeros(128, 1, h, w, device="cuda") for h, w in levels.shapes]
    sizes = torch.tensor([[800, 1344]] * 128, device="cuda")
    classes = select_candidates(logits, ltrb, quality, levels, sizes, topk=10).classes
    assert (classes >= 0).sum() == 2 and classes[-1, 0] == classes[-1, 10] == 1202
