"""Files as torch.save writes them, made without torch."""

from __future__ import annotations

import io
import pickle
import zipfile

_KINDS = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
}


def write_torch(path, tensors, extra=None, *, compression=zipfile.ZIP_STORED, count=None, order=None):
    """A zip of a pickle and of the tensors' bytes.

    Args:
        path: of the file.
        tensors: arrays by name; a view of another order lies in the file as its base does.
        extra: (module, name) of a function that the pickle calls when it is opened.
        compression: of the members.
        count: values that each storage claims to have; None: as many as it has.
        order: of bytes, as newer versions say; None: as older ones.
    """
    out = io.BytesIO()
    writer = pickle._Pickler(out, protocol=2)

    def reference(module, name):
        writer.write(f"c{module}\n{name}\n".encode())

    with zipfile.ZipFile(path, "w", compression) as archive:
        writer.write(pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + pickle.MARK)
        for number, (name, value) in enumerate(tensors.items()):
            stored = value if value.base is None or value.flags.c_contiguous else value.base
            archive.writestr(f"archive/data/{number}", stored.tobytes())
            writer.save(name)
            reference("torch._utils", "_rebuild_tensor_v2")
            writer.write(pickle.MARK + pickle.MARK)
            writer.save("storage")
            reference("torch", _KINDS[str(value.dtype)])
            writer.save(str(number))
            writer.save("cpu")
            writer.save(stored.size if count is None else count)
            writer.write(pickle.TUPLE + pickle.BINPERSID)
            writer.save((value.ctypes.data - stored.ctypes.data) // value.itemsize)
            for numbers in (value.shape, tuple(s // value.itemsize for s in value.strides)):
                writer.write(pickle.MARK)
                for n in numbers:
                    writer.save(n)
                writer.write(pickle.TUPLE)
            writer.write(pickle.NEWFALSE)
            reference("collections", "OrderedDict")
            writer.write(pickle.EMPTY_TUPLE + pickle.REDUCE + pickle.TUPLE + pickle.REDUCE)
        writer.write(pickle.SETITEMS)
        if extra is not None:
            reference(*extra)
            writer.write(b"(Vecho\ntR")
        writer.write(pickle.STOP)
        archive.writestr("archive/data.pkl", out.getvalue())
        if order is not None:
            archive.writestr("archive/byteorder", order)
