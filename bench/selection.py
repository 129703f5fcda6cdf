"""What `pytest bench` measures: a short selection, and with --full everything."""

import ml_dtypes  # noqa: F401 - NumPy then knows bfloat16

from fastbn.cli.cases import CORES, FEW, FUSED, PLAIN, RESNET50, Case, images, short_cases

IMAGES = ("NCHW", "NHWC")
ONE_CALL = Case("layer", "NC", (64, 64), CORES, family="one call")
OTHERS = [
    *(("MLP", "NC", shape) for shape in [(256, 1024), (4096, 1024), (100_000, 64)]),
    *(("course", "CM", shape) for shape in [(20, 500), (128, 5000)]),
    *(("tiny", "NC", shape) for shape in [(8, 4), (32, 16)]),
    ("few channels", "NCHW", (256, 3, 64, 64)),
    ("few channels", "NCHW", (1, 3, 1000, 1000)),
    ("few channels", "NHWC", (256, 64, 64, 3)),
    ("few channels", "NHWC", (1, 1000, 1000, 3)),
]
SHORT_FLOATS = [
    (dtype, "other dtypes", layout, shape)
    for dtype in ("float64", "float16", "bfloat16")
    for layout, shape in [
        ("NCHW", (32, 256, 28, 28)),
        ("NHWC", (32, 28, 28, 256)),
        ("NC", (100_000, 64)),
    ]
]


def default():
    """Return the cases of `fastbn bench`, and some more: all that README and docs need."""
    return [
        *(case for line in short_cases(CORES) for case in line),
        ONE_CALL,
        *(
            case
            for operation, layout in [
                ("forward_add_relu", "NHWC"),
                ("backward_add_relu", "NCHW"),
                ("backward_add_relu", "NHWC"),
            ]
            for case in images(operation, layout, CORES, FEW)
        ),
        *(
            Case(operation, layout, shape, CORES, family=family)
            for family, layout, shape in OTHERS
            if family in ("MLP", "course")
            for operation in PLAIN
        ),
    ]


def everything():
    """Return all cases, each at one thread and at as many as there are CPUs."""
    return [
        case
        for threads in sorted({1, CORES})
        for case in [
            *(
                case
                for operation in (*PLAIN, *FUSED)
                for layout in IMAGES
                for case in images(operation, layout, threads, RESNET50)
            ),
            *(
                Case(operation, layout, shape, threads, family=family)
                for family, layout, shape in OTHERS
                for operation in PLAIN
            ),
            *(
                Case(operation, layout, shape, threads, dtype, family=family)
                for dtype, family, layout, shape in SHORT_FLOATS
                for operation in PLAIN
            ),
            Case("forward", "NC", (64, 64), threads, family="one call"),
            Case("layer", "NC", (64, 64), threads, family="one call"),
        ]
    ]
