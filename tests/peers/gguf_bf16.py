"""`gguf_bf16.py IN.gguf OUT.gguf`: the same model with every matrix in bf16, so that all peers read equal weights."""

import sys

import gguf
import numpy as np

source = gguf.GGUFReader(sys.argv[1])
fields = source.fields
arch = fields["general.architecture"].contents()
out = gguf.GGUFWriter(sys.argv[2], arch)
for name, field in fields.items():
    if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
        continue
    kind = field.types[0]
    out.add_key_value(name, field.contents(), kind, sub_type=field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
out.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
for tensor in source.tensors:
    values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    if values.ndim == 1:
        out.add_tensor(tensor.name, values)
    else:
        bf16 = gguf.quantize(values, gguf.GGMLQuantizationType.BF16)
        out.add_tensor(tensor.name, bf16, raw_dtype=gguf.GGMLQuantizationType.BF16)
out.write_header_to_file()
out.write_kv_data_to_file()
out.write_tensors_to_file()
out.close()
