"""Build facts and test hooks of attnx; importing it registers torch.ops.attnx."""

from typing import Any, TypedDict

version: str
cuda_on_host: bool

def build_info() -> dict[str, Any]: ...
def capabilities() -> str: ...
def cpu_instruction_sets() -> list[str]: ...
def cpu_instruction_set() -> str: ...
def set_cpu_instruction_set(name: str) -> None: ...
def cuda_emulated() -> bool: ...
def interrupt_staircase_append(units: int) -> None: ...

class CudaKernel(TypedDict):
    kernel: str  # as profilers show it
    mainloop: str  # "sm80"
    rows: int  # of a tile
    keys: int
    head_dim: int  # what it is padded to
    aligned: bool  # whether rows lie on 16 bytes
    splits: int  # shares of the keys
    why_not_sm90: str  # on a device for it; empty where its mainloop serves the call

# In builds with CUDA kernels.
def cuda_forward_kernel(
    operator: str,
    dtype: str,
    batch: int,
    heads_q: int,
    heads_k: int,
    length_q: int,
    length_k: int,
    head_dim: int,
    value_dim: int,
    window: tuple[int, int] = (-1, -1),
    packed_rows: tuple[int, int] = (0, 0),
    block_size: tuple[int, int] = (0, 0),
    query: tuple[int, int, int, int] | None = None,
    key: tuple[int, int, int, int] | None = None,
    value: tuple[int, int, int, int] | None = None,
    cache: tuple[list[int], int, int, int, int] | None = None,
    clusters_and_slots: tuple[int, int] = (0, 0),
    terms: bool = False,
) -> CudaKernel: ...
def cuda_backward_kernel(
    operator: str,
    dtype: str,
    batch: int,
    heads_q: int,
    heads_k: int,
    length_q: int,
    length_k: int,
    head_dim: int,
    value_dim: int,
    window: tuple[int, int] = (-1, -1),
    packed_rows: tuple[int, int] = (0, 0),
    block_size: tuple[int, int] = (0, 0),
    query: tuple[int, int, int, int] | None = None,
    key: tuple[int, int, int, int] | None = None,
    value: tuple[int, int, int, int] | None = None,
    cache: tuple[list[int], int, int, int, int] | None = None,
    clusters_and_slots: tuple[int, int] = (0, 0),
    terms: bool = False,
) -> CudaKernel: ...
def cuda_mainloop() -> str: ...
def set_cuda_mainloop(name: str) -> None: ...
def cuda_sigmoid_weights(logits: int, weights: int, n: int, dtype: str, exact: bool) -> None: ...
def cuda_critical_blocks(
    labels: int,
    heads: int,
    query_blocks: int,
    key_blocks: int,
    transposed: bool,
    counts: int,
    indices: int,
) -> None: ...
def cuda_block_products(
    query: tuple[int, int, int, int],
    key: tuple[int, int, int, int],
    dtype: str,
    batch: int,
    heads_q: int,
    heads_k: int,
    length_q: int,
    length_k: int,
    head_dim: int,
    block_size: tuple[int, int],
    smooth_k: bool,
    scale: float,
    products: int,
    workspace: int,
) -> int: ...
def cuda_normalise_rows(
    rows: tuple[int, int, int, int],
    dtype: str,
    batch: int,
    heads: int,
    length: int,
    head_dim: int,
    normalised: int,
) -> None: ...
def cuda_pad_centroids(centroids: int, heads: int, clusters: int, head_dim: int, padded: int) -> None: ...
def cuda_routing_scores(
    problems: int,
    rows: int,
    centroids: int,
    features: int,
    row_matrix: tuple[int, int, int],
    centroid_matrix: tuple[int, int, int],
    score_matrix: tuple[int, int, int],
) -> None: ...
