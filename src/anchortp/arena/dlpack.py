"""A tensor over given memory, for whoever reads DLPack capsules. No torch, no numpy.

Source: dlpack.h 0.8 (`DLManagedTensor`), which every consumer still takes.
"""

from __future__ import annotations

import ctypes
import itertools

CPU, CUDA = 1, 2  # DLDeviceType; kDLROCM is 10
_UINT = 1  # DLDataTypeCode


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("type_code", ctypes.c_uint8),
        ("type_bits", ctypes.c_uint8),
        ("type_lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))

_Destructor = ctypes.CFUNCTYPE(None, ctypes.c_void_p)  # not py_object: the capsule is being destroyed
_NAME = b"dltensor"  # a consumer renames the capsule, and calls the deleter when its tensor goes

_new = ctypes.pythonapi.PyCapsule_New
_new.argtypes, _new.restype = (ctypes.c_void_p, ctypes.c_char_p, _Destructor), ctypes.py_object
_is_valid = ctypes.pythonapi.PyCapsule_IsValid
_is_valid.argtypes, _is_valid.restype = (ctypes.c_void_p, ctypes.c_char_p), ctypes.c_int
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.argtypes, _pointer.restype = (ctypes.c_void_p, ctypes.c_char_p), ctypes.c_void_p

_alive: dict[int, tuple[_Managed, object, object]] = {}  # what a living tensor needs, by the key in its context
_keys = itertools.count(1)


@_Deleter
def _delete(managed) -> None:
    _alive.pop(managed.contents.context, None)


@_Destructor
def _destroy(capsule: int) -> None:
    if _is_valid(capsule, _NAME):  # nobody took it
        _delete(ctypes.cast(_pointer(capsule, _NAME), ctypes.POINTER(_Managed)))


def capsule(address: int, num_bytes: int, device: tuple[int, int], *, owner: object) -> object:
    """A capsule of `num_bytes` uint8 at `address`; `owner` lives as long as a tensor made of it.

    `device`: DLPack's type and number. The address is not looked at: it need not be mapped throughout.
    """
    key = next(_keys)
    shape = (ctypes.c_int64 * 1)(num_bytes)
    tensor = _Tensor(data=address, device_type=device[0], device_id=device[1], ndim=1, shape=shape)
    tensor.type_code, tensor.type_bits, tensor.type_lanes = _UINT, 8, 1
    managed = _Managed(tensor=tensor, context=key, deleter=_delete)
    _alive[key] = (managed, shape, owner)
    return _new(ctypes.addressof(managed), _NAME, _destroy)
