"""Public names of MLX that need no case of their own, and why."""

from __future__ import annotations

_DTYPE = "a dtype, or asks about dtypes"
_DEVICE = "a device or a stream"
_VALUE = "asks for a value: there is none while a transform traces, and MLX says so"
_MEMORY = "the allocator"
_FILE = "files and exported functions"
_TRANSFORM = "a transform: tests/test_vmap.py, tests/test_autodiff.py"
_PYTHON = "Python's own protocol, no computation"
_CONSTANT = "a number"
_PRINT = "how arrays are printed"
_KERNEL = "the user's own kernel: MLX has no derivative and no batching rule for it"
_PROCESSES = "an exchange between processes, of which a test has one"
_SHAPES = "of shapes or equations, not of arrays"
_NO_CPU = "has no kernel on the CPU"


def _reason(reason: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), reason)


NOT_OPERATIONS: dict[str, str] = {
    **_reason(
        _DTYPE,
        "Dtype DtypeCategory bfloat16 bool_ complex64 complexfloating finfo float16 float32 "
        "float64 floating generic iinfo inexact int16 int32 int64 int8 integer number "
        "signedinteger uint16 uint32 uint64 uint8 unsignedinteger can_cast isdtype issubdtype "
        "result_type array.dtype array.itemsize",
    ),
    **_reason(
        _DEVICE,
        "Device DeviceType Stream StreamContext ThreadLocalStream cpu gpu cuda metal "
        "clear_streams default_device default_stream device_count device_info is_available "
        "new_stream new_thread_local_stream new_thread_unsafe_stream set_default_device "
        "set_default_stream stream synchronize",
    ),
    **_reason(
        _VALUE,
        "async_eval array.item array.tolist array.__array__ array.__bool__ array.__bytes__ "
        "array.__buffer__ array.__release_buffer__ "
        "array.__complex__ array.__dlpack__ array.__dlpack_device__ array.__float__ "
        "array.__index__ array.__int__ array.__getstate__ array.__setstate__ array.__repr__ "
        "array.__format__ from_dlpack",
    ),
    **_reason(
        _MEMORY,
        "clear_cache get_active_memory get_array_buffer_size get_cache_memory get_memory_limit "
        "get_peak_memory reset_peak_memory set_cache_limit set_memory_limit set_wired_limit",
    ),
    **_reason(
        _FILE,
        "FunctionExporter export_function export_to_dot exporter import_function load save "
        "save_gguf save_safetensors savez savez_compressed",
    ),
    **_reason(
        _TRANSFORM,
        "disable_compile enable_compile grad jvp value_and_grad vjp vmap",
    ),
    **_reason(
        _PYTHON,
        "ArrayAt ArrayIterator ArrayLike array.__array_namespace__ array.__len__ array.at "
        "array.ndim array.nbytes array.shape array.size array.at.__getitem__",
    ),
    **_reason(_CONSTANT, "e euler_gamma inf nan newaxis pi"),
    **_reason(_PRINT, "PrintOptions get_printoptions printoptions set_printoptions"),
    **_reason(_KERNEL, "fast.cuda_kernel fast.metal_kernel fast.precompiled_cuda_kernel"),
    **_reason(
        _PROCESSES,
        "distributed.Group distributed.all_gather distributed.all_max distributed.all_min "
        "distributed.all_sum distributed.init distributed.is_available distributed.recv "
        "distributed.recv_like distributed.send distributed.sum_scatter",
    ),
    **_reason(_NO_CPU, "qqmm gather_qqmm"),
    **_reason(_SHAPES, "broadcast_shapes einsum_path"),
    **_reason("makes and sets keys outside every transform", "random.seed random.state"),
}

#: Names whose family is still to come: to be emptied.
PENDING: set[str] = set()
