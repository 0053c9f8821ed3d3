"""ctypes bindings to ggml's functions for tensors and GGUF files, from llama-cpp-python."""

import ctypes
from pathlib import Path

F32 = 0
"""Value of GGML_TYPE_F32 in ggml.h."""


class InitParams(ctypes.Structure):
    """ggml's `gguf_init_params`; if `ctx` is set, tensors with their data are read into it."""

    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.POINTER(ctypes.c_void_p))]


class ContextParams(ctypes.Structure):
    """ggml's `ggml_init_params`; `mem_size` is the memory for all tensors of the context, bytes."""

    _fields_ = [
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    ]


class Tensor(ctypes.Structure):
    """ggml's `ggml_tensor`, to read fields without an accessor, e.g. the operands of an operation.

    ggml calls the operands sources (`src`).
    """


Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]


def library() -> ctypes.CDLL:
    """Load ggml and declare the types of the functions used.

    Without a declaration, ctypes would truncate pointers to 32 bits.
    """
    # Importing the bindings loads all of ggml's libraries in the order of their dependencies.
    from llama_cpp._ggml import libggml_base_path

    ggml = ctypes.CDLL(str(Path(libggml_base_path, "libggml-base.so")))
    context, tensor, name = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p
    index = ctypes.c_int64
    for function_name, result, arguments in (
        ("gguf_init_from_file", ctypes.c_void_p, [name, InitParams]),
        ("gguf_init_empty", ctypes.c_void_p, []),
        ("gguf_free", None, [context]),
        ("gguf_get_n_tensors", ctypes.c_int64, [context]),
        ("gguf_get_tensor_name", name, [context, index]),
        ("gguf_get_tensor_type", ctypes.c_int, [context, index]),
        ("gguf_get_tensor_ne", ctypes.POINTER(ctypes.c_int64), [context, index]),
        ("gguf_get_tensor_size", ctypes.c_size_t, [context, index]),
        ("gguf_set_val_str", None, [context, name, name]),
        ("gguf_set_val_u32", None, [context, name, ctypes.c_uint32]),
        ("gguf_set_arr_str", None, [context, name, ctypes.POINTER(name), ctypes.c_size_t]),
        ("gguf_add_tensor", None, [context, tensor]),
        ("gguf_write_to_file", ctypes.c_bool, [context, name, ctypes.c_bool]),
        ("ggml_init", ctypes.c_void_p, [ContextParams]),
        ("ggml_free", None, [context]),
        ("ggml_tensor_overhead", ctypes.c_size_t, []),
        ("ggml_new_tensor_2d", ctypes.c_void_p, [context, ctypes.c_int, index, index]),
        ("ggml_set_name", ctypes.c_void_p, [tensor, name]),
        ("ggml_get_name", name, [tensor]),
        ("ggml_get_tensor", ctypes.c_void_p, [context, name]),
        ("ggml_get_data", ctypes.c_void_p, [tensor]),
        ("ggml_nelements", ctypes.c_int64, [tensor]),
        ("ggml_op_name", name, [ctypes.c_int]),
        ("ggml_type_name", name, [ctypes.c_int]),
    ):
        function = getattr(ggml, function_name)
        function.restype, function.argtypes = result, arguments
    return ggml
