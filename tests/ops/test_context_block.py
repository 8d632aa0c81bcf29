"""Context pooling and fusion against eager PyTorch in float64."""
import pytest
import torch
from torch import Tensor

from mmdet.ops import context_fuse, context_pool

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def eager_pool(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    logits = torch.nn.functional.conv2d(x, weight[None, :, None, None], bias)
    return torch.matmul(x.flatten(2), logits.flatten(2).softmax(2).transpose(1, 2))[..., 0]


def eager_fuse(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, identity: Tensor | None = None, relu: bool = False
) -> Tensor:
    x = x if scale is None else x * scale[:, :, None, None]
    x = x + 0 if shift is None else x + shift[:, :, None, None]
    x = x if identity is None else x + identity
    return x.relu() if relu else x


def pool(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return context_pool(x, weight, bias)[0]


def assert_same(op, eager, args: list[Tensor | None], tolerance: float) -> None:
    """Outputs and all gradients, within `tolerance` of the float64 reference's deviation and value."""
    ours = [None if arg is None else arg.detach().requires_grad_() for arg in args]
    theirs = [None if arg is None else arg.detach().cpu().double().requires_grad_() for arg in args]
    output, expected = op(*ours), eager(*theirs)
    grad = torch.randn(output.shape).to(output)
    output.backward(grad)
    expected.backward(grad.cpu().double())
    pairs = [(output, expected)] + [(a.grad, b.grad) for a, b in zip(ours, theirs) if a is not None]
    dtype = args[0].dtype
    assert output.dtype == (dtype if output.ndim == 4 or dtype == torch.float64 else torch.float32)
    for ours_part, theirs_part in pairs:
        theirs_part = theirs_part.detach()
        deviation = theirs_part.std() if theirs_part.numel() > 1 else theirs_part.abs()
        error = (ours_part.detach().cpu().double() - theirs_part).abs()
        assert (error <= tolerance * (deviation + theirs_part.abs()) + 1e-12).all()


def tolerance_of(dtype: torch.dtype) -> float:
    return {torch.float32: 1e-5, torch.float64: 1e-12}.get(dtype, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('shape', [(2, 64, 25, 42), (1, 3, 1, 1), (3, 130, 7, 5), (2, 17, 33, 65)])
def test_pool_equals_eager(device, dtype, shape):
    x = torch.randn(shape).to(device, dtype)
    weight = torch.randn(shape[1]).to(device, dtype) / shape[1]**0.5
    bias = torch.randn(1).to(device, dtype)
    # All but the bias, whose gradient is zero but for rounding.
    assert_same(
        lambda x, w: pool(x, w, bias), lambda x, w: eager_pool(x, w, bias.cpu().double()),
        [x, weight], tolerance_of(dtype))


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('shape', [(2, 64, 25, 42), (3, 131, 7, 5), (2, 1024, 16, 8), (1, 3, 200, 200)])
def test_channels_last_and_many_tiles(device, dtype, layout, shape):
    """Rows with and without vectors that end short, one tile and several; the output keeps the layout."""
    x, identity = torch.randn(2, *shape).to(device, dtype)
    x, identity = (part.contiguous(memory_format=layout) for part in (x, identity))
    weight, bias = torch.randn(shape[1]).to(device, dtype) / shape[1]**0.5, torch.zeros(1).to(device, dtype)
    assert_same(lambda x, w: pool(x, w, bias), lambda x, w: eager_pool(x, w, bias.cpu().double()),
                [x, weight], tolerance_of(dtype))
    scale, shift = torch.randn(2, *shape[:2]).to(device, dtype)
    output = context_fuse(x, scale, shift, identity)
    assert output.stride() == x.stride()
    assert_same(context_fuse, eager_fuse, [x, scale, shift, identity], tolerance_of(dtype))
    assert_same(context_fuse, eager_fuse, [x, None, shift, identity], tolerance_of(dtype))


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype, channels', [(torch.float32, 1030), (torch.float64, 515)])
def test_maps_larger_than_the_cache(device, dtype, channels, layout):
    """Of more than 32 MB, which are fetched and written in other ways; with rows that vectors do not fill."""
    x, identity = torch.randn(2, 1, channels, 91, 95).to(device, dtype)
    assert x.nbytes > 32 << 20
    x, identity = (part.contiguous(memory_format=layout) for part in (x, identity))
    weight, bias = torch.randn(channels).to(device, dtype) / channels**0.5, torch.zeros(1).to(device, dtype)
    assert_same(lambda x, w: pool(x, w, bias), lambda x, w: eager_pool(x, w, bias.cpu().double()),
                [x, weight], tolerance_of(dtype))
    scale, shift = torch.randn(2, 1, channels).to(device, dtype)
    assert_same(context_fuse, eager_fuse, [x, scale, shift, identity], tolerance_of(dtype))
    x, identity, shift = x.round(), identity.round(), shift.round()  # no rounding moves the sign
    assert_same(lambda *args: context_fuse(*args, relu=True), lambda *args: eager_fuse(*args, relu=True),
                [x, None, shift, identity], tolerance_of(dtype))


@pytest.mark.parametrize('dtype', DTYPES)
def test_no_weight_is_the_mean(device, dtype):
    x = torch.randn(2, 17, 33, 65).to(device, dtype)
    assert_same(lambda x: context_pool(x)[0], lambda x: x.mean((2, 3)), [x], tolerance_of(dtype))


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_what_pooling_hands_on_has_the_whole_gradient(device, layout):
    x = torch.randn(2, 17, 9, 11).to(device).contiguous(memory_format=layout)
    weight, bias = torch.randn(17).to(device), torch.zeros(1, device=device)

    def ours(x: Tensor, w: Tensor) -> Tensor:
        context, handed_on = context_pool(x, w, bias)
        assert torch.equal(handed_on, x) and handed_on.data_ptr() == x.data_ptr()
        return handed_on.sin() * context[:, :, None, None]

    def eager(x: Tensor, w: Tensor) -> Tensor:
        return x.sin() * eager_pool(x, w, bias.cpu().double())[:, :, None, None]

    assert_same(ours, eager, [x, weight], 1e-5)
    # Nothing need follow the context.
    x.requires_grad_()
    [grad] = torch.autograd.grad(context_pool(x, weight, bias)[1].sin().sum(), x)
    torch.testing.assert_close(grad, x.cos())


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('scaled, shifted', [(True, True), (True, False), (False, True), (False, False)])
def test_fuse_equals_eager(device, dtype, scaled, shifted):
    x = torch.randn(2, 17, 33, 65).to(device, dtype)
    scale, shift = torch.randn(2, 2, 17).to(device, dtype)
    assert_same(
        context_fuse, eager_fuse, [x, scale if scaled else None, shift if shifted else None],
        tolerance_of(dtype))


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('scaled', [True, False])
@pytest.mark.parametrize('dtype', DTYPES)
def test_fuse_with_relu(device, dtype, scaled, layout):
    """Integers, so that no rounding moves the sign, and both signs, zero and a gradient at zero are there."""
    x, identity = torch.randint(-3, 4, (2, 2, 17, 33, 65)).to(device, dtype)
    x, identity = (part.contiguous(memory_format=layout) for part in (x, identity))
    scale, shift = torch.randint(-2, 3, (2, 2, 17)).to(device, dtype)
    args = [x, scale if scaled else None, shift, identity]
    assert (eager_fuse(*args) == 0).any() and (eager_fuse(*args) < 0).any()
    assert_same(lambda *args: context_fuse(*args, relu=True), lambda *args: eager_fuse(*args, relu=True),
                args, tolerance_of(dtype))


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_logits_of_minus_infinity_weigh_nothing(device, layout):
    """Even if a whole tile has no other."""
    x = torch.randn(1, 24, 80, 90)
    x[:, 0, :50] = -3e38
    weight = torch.cat([torch.tensor([10.0]), torch.randn(23)])
    context, _ = context_pool(x.to(device, memory_format=layout), weight.to(device))
    expected = eager_pool(x[:, :, 50:].double(), weight.double(), torch.zeros(1).double())
    torch.testing.assert_close(context.cpu().double(), expected, rtol=1e-5, atol=1e-5)


def test_not_a_number_stays(device):
    """Only where it is, in the sums as well."""
    x = torch.zeros(2, 3, 4, 5, device=device)
    x[1, 2, 3, 4] = float('nan')
    shift = torch.zeros(2, 3, device=device)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = x.detach().contiguous(memory_format=layout).requires_grad_()
        output = context_fuse(x, None, shift, None, True)
        output.sum().backward()
        assert torch.equal(output.isnan(), x.isnan()) and torch.equal(x.grad, x.isnan().float())
    nan = pool(x, torch.ones(3, device=device), torch.zeros(1, device=device)).isnan()
    assert nan.tolist() == [[False] * 3, [True] * 3]


def test_what_is_kept_for_the_backward_pass(device):
    """Of maps, x and the output at most: never a copy."""
    x, identity = torch.randn(2, 2, 64, 40, 50).to(device)
    weight, bias = torch.randn(64).to(device), torch.zeros(1, device=device)
    x.requires_grad_()
    identity.requires_grad_()
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        context, handed_on = context_pool(x, weight, bias)
        output = context_fuse(handed_on, None, context, identity, relu=True)
    maps = {tensor.data_ptr() for tensor in kept if tensor.numel() >= x.numel()}
    assert maps == {x.data_ptr(), output.data_ptr()}
    assert sum(tensor.numel() for tensor in kept if tensor.numel() < x.numel()) < x.numel() / 16


@pytest.mark.parametrize('offset', [0.0, 1e4])
def test_pool_stays_accurate(device, offset):
    """Sums over many positions and channels, logits too large for exp."""
    x = torch.randn(1, 1024, 40, 60).to(device)
    weight, bias = torch.randn(1024).to(device) / 16, torch.full((1,), offset, device=device)
    reference = eager_pool(x.cpu().double(), weight.cpu().double(), bias.cpu().double())
    error = (pool(x, weight, bias).cpu().double() - reference).abs().max()
    assert error < (1e-5 if offset == 0 else 2e-3) * reference.std()


def test_bias_has_no_gradient(device):
    args = [part.double().to(device).requires_grad_() for part in (
        torch.randn(2, 3, 4, 5), torch.randn(3), torch.randn(1))]
    pool(*args).square().sum().backward()
    assert args[2].grad.tolist() == [0]


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_gradcheck(device, block, layout):
    maps = [torch.randn(2, 3, 4, 5).contiguous(memory_format=layout) for _ in range(2)]
    x, weight, bias, scale, shift, identity = (part.double().to(device).requires_grad_() for part in (
        maps[0], torch.randn(3), torch.randn(1), torch.randn(2, 3), torch.randn(2, 3), maps[1]))
    torch.autograd.gradcheck(context_pool, (x, weight, bias))
    torch.autograd.gradcheck(block, (x, weight, bias, identity))
    torch.autograd.gradcheck(context_fuse, (x, scale, shift))
    torch.autograd.gradcheck(lambda *args: context_fuse(*args, relu=True), (x, scale, shift, identity))
    torch.autograd.gradcheck(lambda *args: context_fuse(*args, relu=True), (x, None, shift, identity))
    torch.autograd.gradcheck(lambda x, scale: context_fuse(x, scale, None), (x, scale))
    torch.autograd.gradcheck(lambda x, shift: context_fuse(x, None, shift), (x, shift))


@pytest.mark.parametrize('needed', range(3))
def test_gradient_of_one_input_alone(device, needed):
    for op, args in (
            (pool, [torch.randn(2, 3, 4, 5), torch.randn(3), torch.randn(1)]),
            (context_fuse, [torch.randn(2, 3, 4, 5), torch.randn(2, 3), torch.randn(2, 3)])):
        args = [arg.to(device) for arg in args]
        everything = [arg.clone().requires_grad_() for arg in args]
        args[needed].requires_grad_()
        op(*args).square().sum().backward()
        op(*everything).square().sum().backward()
        assert torch.equal(args[needed].grad, everything[needed].grad)


@pytest.mark.parametrize('layout', ['channels_last', 'slice', 'transposed', 'expanded'])
def test_strides(device, layout):
    x = torch.randn(2, 6, 20, 30, device=device)
    strided = {
        'channels_last': x.contiguous(memory_format=torch.channels_last),
        'slice': torch.randn(2, 9, 25, 33, device=device)[:, 1:7, 2:22, 3:],
        'transposed': torch.randn(2, 6, 30, 20, device=device).transpose(2, 3),
        'expanded': torch.randn(2, 1, 20, 30, device=device).expand(2, 6, 20, 30),
    }[layout]
    weight, scale = torch.randn(12, device=device)[::2], torch.randn(6, 2, device=device).t()
    assert not strided.is_contiguous() and not weight.is_contiguous() and not scale.is_contiguous()
    bias = torch.randn(1, device=device)
    assert_same(lambda x, w: pool(x, w, bias),
                lambda x, w: eager_pool(x, w, bias.cpu().double()), [strided, weight], 1e-5)
    for identity in (strided, x):
        assert_same(context_fuse, eager_fuse, [strided, scale, scale, identity], 1e-5)


@pytest.mark.parametrize('shape', [(0, 3, 4, 5), (2, 3, 0, 5), (2, 0, 4, 5)])
def test_empty(device, shape):
    n, c = shape[:2]
    x = torch.randn(shape, device=device, requires_grad=True)
    weight, scale = (torch.randn(size, device=device, requires_grad=True) for size in ((c,), (n, c)))
    pooled, handed_on = context_pool(x, weight, torch.zeros(1, device=device))
    assert pooled.shape == (n, c) and pooled.count_nonzero() == 0
    (pooled.sum() + context_fuse(handed_on, scale, scale, x, relu=True).sum()).backward()
    assert x.grad.shape == shape and weight.grad.count_nonzero() == 0 and scale.grad.count_nonzero() == 0


def test_float32_parameters_of_a_half_precision_map(device):
    """Under autocast the map is half precision and the parameters are not: nothing rounds them."""
    x, bias = torch.randn(2, 8, 9, 9, device=device).bfloat16(), torch.randn(1, device=device)
    weight, scale = (torch.randn(size, device=device, requires_grad=True) for size in ((8,), (2, 8)))
    pooled_expected = pool(x.float(), weight, bias)
    fused_expected = context_fuse(x.float(), scale, scale)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        pooled, fused = pool(x, weight, bias), context_fuse(x, scale, scale)
        assert pool(x.float(), weight, bias).dtype == torch.float32
    assert pooled.dtype == torch.float32 and fused.dtype == torch.bfloat16
    torch.testing.assert_close(pooled, pooled_expected)
    torch.testing.assert_close(fused, fused_expected.bfloat16())
    (pooled.sum() + fused.sum()).backward()
    assert weight.grad.dtype == scale.grad.dtype == torch.float32
    identity = torch.randn(2, 8, 9, 9, device=device, requires_grad=True)
    context_fuse(x, scale, scale, identity).sum().backward()
    assert identity.grad.dtype == torch.float32


def test_errors(device):
    x, weight, bias, scale = (
        torch.randn(size, device=device) for size in ((2, 3, 4, 5), (3,), (1,), (2, 3)))
    for call, error, message in [
            (lambda: context_pool(x[0], weight, bias), ValueError, r'x must be \(N, C, H, W\), got'),
            (lambda: context_pool(x, weight[:2], bias), ValueError, r'weight must be \[3\], got \[2\]'),
            (lambda: context_pool(x, weight, weight), ValueError, r'bias must be \[1\], got \[3\]'),
            (lambda: context_pool(x.int(), weight, bias), TypeError, 'x must be floating point, got Int'),
            (lambda: context_fuse(x, scale[:1], None), ValueError, r'scale must be \[2, 3\], got \[1, 3\]'),
            (lambda: context_fuse(x, None, scale.int()), TypeError, 'shift must be floating point, got Int'),
            (lambda: context_fuse(x, None, scale, x[:, :, 1:]), ValueError, r'identity must be \[2, 3,')]:
        with pytest.raises(error, match=message) as caught:
            call()
        assert '\n' not in str(caught.value)


@pytest.mark.parametrize('requires_grad', [False, True])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_opcheck(device, dtype, requires_grad):
    x, weight, bias, scale = (part.to(device, dtype).requires_grad_(requires_grad) for part in (
        torch.randn(2, 3, 4, 5), torch.randn(3), torch.randn(1), torch.randn(2, 3)))
    ops = torch.ops.mmdet
    torch.library.opcheck(ops.context_pool.default, (x, weight, bias))
    for args in ((scale, scale, x, True), (scale, None, None, False), (None, scale, x, False)):
        torch.library.opcheck(ops.context_fuse.default, (x, *args))
    x, weight, scale = x.detach(), weight.detach(), scale.detach()
    for layout in (torch.contiguous_format, torch.channels_last):
        x = x.contiguous(memory_format=layout)
        context, attention = (part.detach() for part in ops.context_pool(x, weight, bias))
        for grad_map in (None, x):
            torch.library.opcheck(
                ops.context_pool_backward.default, (scale, grad_map, x, weight, context, attention))
        for args in ((x, scale, x), (None, None, x), (None, None, None)):
            torch.library.opcheck(ops.context_fuse_backward.default, (x, *args))


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_compile_and_export(device, block, layout):
    class Block(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, bias: Tensor, identity: Tensor) -> Tensor:
            return block(x, weight, bias, identity)

    args = [part.to(device) for part in (torch.randn(2, 3, 4, 5).contiguous(memory_format=layout),
                                         torch.randn(3), torch.randn(1), torch.randn(2, 3, 4, 5))]
    eager, traced, exported = ([part.clone().requires_grad_() for part in args] for _ in range(3))
    expected = block(*eager)
    output = torch.compile(block, fullgraph=True, backend='aot_eager')(*traced)
    torch.testing.assert_close(output, expected)
    program = torch.export.export(Block(), tuple(args))
    assert 'mmdet.context_pool' in str(program.graph)
    run = program.module()(*exported)
    torch.testing.assert_close(run, expected)
    for result in (expected, output, run):
        result.square().sum().backward()
    for ours, theirs, third in zip(traced, eager, exported):
        torch.testing.assert_close(ours.grad, theirs.grad)
        torch.testing.assert_close(third.grad, theirs.grad)


def test_a_wider_identity_is_added_before_rounding(device):
    x, identity = (torch.full((1, 1, 1, 1), value, device=device) for value in (-60000.0, 70000.0))
    assert context_fuse(x.half(), None, None, identity).item() == 10000
