"""Build of the optional C kernels; everything else is declared in pyproject.toml.

A failed compilation only warns: without the kernels the optimizers take their plain PyTorch paths.
"""

import sys

from setuptools import Extension, setup

flags = (
    []
    if sys.platform == "win32"
    else ["-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
)
setup(
    ext_modules=[
        Extension(
            "conjugo.optim._kernels",
            ["src/conjugo/optim/_kernels.c"],
            extra_compile_args=flags,
            depends=["src/conjugo/optim/_kernels_body.h"],
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            py_limited_api=True,
            optional=True,
        )
    ]
)
