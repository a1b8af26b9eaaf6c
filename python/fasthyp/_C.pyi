"""The compiled kernels. Addresses are ``Tensor.data_ptr()``; ``fasthyp.ops`` checks them."""

from collections.abc import Sequence

version: str
cuda_archs: str | None

def simd_levels() -> list[str]: ...
def simd_level() -> str: ...
def set_simd_level(name: str) -> None: ...
def cuda_device_count() -> int: ...
def coupling_packed_bytes(plan: Sequence[int]) -> int: ...
def coupling_lanes(element: int) -> int: ...
def coupling_pack(
    plan: int,
    plan_size: int,
    tensors: Sequence[tuple[int, int]],
    packed: int,
    packed_bytes: int,
    threads: int,
) -> None: ...
def coupling_run(
    plan: int,
    plan_size: int,
    packed: int,
    packed_bytes: int,
    inverse: bool,
    images: int,
    per_image: int,
    input: int,
    cond: int,
    output: int,
    log_det: int,
    threads: int,
    seed: int,
    image_offset: int,
    first_sample: int,
    fixed: int,
    fixed_dims: int,
    include_mode: bool,
) -> None: ...
def coupling_saved_width(plan: Sequence[int], keep_every: int, store: bool) -> int: ...
def coupling_pass(
    plan: Sequence[int],
    packed: int,
    packed_bytes: int,
    inverse: bool,
    images: int,
    per_image: int,
    x: int,
    cond: int,
    out: int,
    log_det: int,
    saved: int,
    keep_every: int,
    store: bool,
    threads: int,
) -> None: ...
def coupling_backward(
    plan: Sequence[int],
    packed: int,
    packed_bytes: int,
    inverse: bool,
    images: int,
    per_image: int,
    out: int,
    saved: int,
    keep_every: int,
    store: bool,
    cond: int,
    grad_out: int,
    grad_log_det: int,
    grad_x: int,
    grad_cond: int,
    grad_weights: int,
    wanted: Sequence[bool],
    threads: int,
) -> None: ...
def coupling_affine(
    state: int,
    rows: int,
    dim: int,
    raw: int,
    is_double: bool,
    active: Sequence[int],
    clamp: float,
    clamp_activation: int,
    inverse: bool,
    log_det: int,
    threads: int,
) -> None: ...
def coupling_cuda_fits(plan: int, plan_size: int, device: int) -> bool: ...
def coupling_cuda_workspace(plan: int, plan_size: int, images: int, per_image: int) -> int: ...
def coupling_cuda_run(
    plan: int,
    plan_size: int,
    packed: int,
    packed_bytes: int,
    inverse: bool,
    images: int,
    per_image: int,
    input: int,
    cond: int,
    output: int,
    log_det: int,
    workspace: int,
    workspace_bytes: int,
    seed: int,
    image_offset: int,
    first_sample: int,
    counter: int,
    fixed: int,
    fixed_dims: int,
    include_mode: bool,
    device: int,
    stream: int,
) -> None: ...
def coupling_cuda_saved_width(plan: Sequence[int], keep_every: int, store: bool) -> int: ...
def coupling_cuda_pass_workspace(
    plan: Sequence[int],
    images: int,
    per_image: int,
    keep_every: int,
    store: bool,
    gradient: bool,
    scratch: int,
) -> int: ...
def coupling_cuda_pass(
    plan: Sequence[int],
    weights: Sequence[tuple[int, int]],
    inverse: bool,
    images: int,
    per_image: int,
    cond: int,
    keep_every: int,
    store: bool,
    precision: int,
    workspace: int,
    workspace_bytes: int,
    scratch: int,
    input: int,
    output: int,
    log_det: int,
    saved: int,
    device: int,
    stream: int,
) -> None: ...
def coupling_cuda_pass_gradient(
    plan: Sequence[int],
    weights: Sequence[tuple[int, int]],
    inverse: bool,
    images: int,
    per_image: int,
    cond: int,
    keep_every: int,
    store: bool,
    precision: int,
    workspace: int,
    workspace_bytes: int,
    scratch: int,
    output: int,
    saved: int,
    grad_output: int,
    grad_log_det: int,
    grad_input: int,
    grad_cond: int,
    grad_weights: int,
    wanted: Sequence[bool],
    device: int,
    stream: int,
) -> None: ...
def gaussian_fit_run(
    heatmaps: int,
    is_double: bool,
    count: int,
    height: int,
    width: int,
    init: int,
    init_size: int,
    max_iter: int,
    tol: float,
    scalars: int,
    mean: int,
    covariance: int,
    converged: int,
    iterations: int,
    device: int,
    threads_or_stream: int,
) -> None: ...
def heatmaps_sample(
    maps: int,
    is_double: bool,
    images: int,
    joints: int,
    height: int,
    width: int,
    samples: int,
    threshold: float,
    temperature: float,
    flat_value: float,
    seed: int,
    image_offset: int,
    points: int,
    values: int,
    device: int,
    threads_or_stream: int,
) -> None: ...
def mmd_cuda_workspace(
    is_double: bool, problems: int, n: int, p: int, dim: int, gradient: bool
) -> int: ...
def mmd_run(
    x: int,
    y: int,
    is_double: bool,
    problems: int,
    n: int,
    p: int,
    dim: int,
    x_weights: int,
    y_weights: int,
    squares: int,
    rates: Sequence[float],
    rbf: bool,
    unbiased: bool,
    value: int,
    x_grad: int,
    y_grad: int,
    workspace: int,
    device: int,
    threads_or_stream: int,
) -> None: ...
def procrustes_align(
    source: tuple[int, int, int],
    target: tuple[int, int, int],
    mask: tuple[int, int, int],
    is_double: bool,
    poses: int,
    joints: int,
    results: Sequence[int],
    device: int,
    threads_or_stream: int,
) -> None: ...
def skinning_cuda_workspace(
    sizes: Sequence[int], arrays: Sequence[int], bodies: int, backward: bool
) -> int: ...
def skinning_run(
    sizes: Sequence[int],
    arrays: Sequence[int],
    bodies: int,
    inputs: Sequence[int],
    strides: Sequence[int],
    rotation: int,
    results: Sequence[int],
    backward: bool,
    grads: Sequence[int],
    workspace: int,
    device: int,
    threads_or_stream: int,
) -> None: ...
def philox_normal(
    out: int,
    images: int,
    per_image: int,
    dim: int,
    seed: int,
    image_offset: int,
    first_sample: int,
    threads: int,
) -> None: ...
def philox4x32(counter: Sequence[int], key0: int, key1: int) -> list[int]: ...
