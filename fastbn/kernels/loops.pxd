# The inner loops, for Cython: loops.hpp says what they do.

from fastbn.kernels.job cimport Job, Run

cdef extern from "loops.hpp" namespace "fastbn" nogil:
    cdef cppclass Wide:  # a pack of doubles
        Wide operator+(Wide)
        Wide operator-(Wide)
        Wide operator*(Wide)
        Wide operator/(Wide)
    Wide fill(double value)
    Wide load(const double* p, int lanes)
    void store(double* p, Wide a, int lanes)
    Wide square_root(Wide a)
    unsigned above_zero(Wide a)
    Wide leaky_relu(unsigned signs, Wide a, double slope)
    Wide rounded(Wide value, bint wide)
    double rounded(double value, bint wide)
    double sum_values(const double* values, Py_ssize_t count)

    cdef enum:
        LANES
        MOST_RUNS
        MOST_CHANNELS
    cdef struct Table:
        double* center
        double* scale
        double* shift
        double* slope
        double* level
    cdef struct Runs:
        Py_ssize_t start
        Py_ssize_t channels
        Py_ssize_t length
        Py_ssize_t next_channel
        Py_ssize_t rows
        Py_ssize_t next_row
        Py_ssize_t ahead
    cdef struct Columns:
        Py_ssize_t start
        Py_ssize_t width
        Py_ssize_t rows
        Py_ssize_t next_row
        Py_ssize_t side
        Py_ssize_t ahead
        Py_ssize_t ahead_in_columns
        bint added
    cdef struct Loops:
        bint wide
        bint exact_products
        void (*sum_runs)(
            const Job&, const Runs&, bint, double, double*, Py_ssize_t
        ) noexcept nogil
        void (*sum_valid)(
            const Job&, const Run*, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, bint, double,
            double*, Py_ssize_t
        ) noexcept nogil
        void (*sum_columns)(
            const Job&, const Columns&, const double*, double*, double*
        ) noexcept nogil
        void (*write_runs)(const Job&, const Table&, Py_ssize_t, Py_ssize_t) noexcept nogil
        void (*write_rows)(
            const Job&, const void*, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t
        ) noexcept nogil
        void (*spread_table)(
            const Table&, void*, Py_ssize_t, Py_ssize_t, Py_ssize_t
        ) noexcept nogil
        void (*widen_into)(double*, const void*, Py_ssize_t, Py_ssize_t) noexcept nogil
        double (*value_at)(const void*, Py_ssize_t) noexcept nogil
        double (*gradient_at)(const Job&, Py_ssize_t) noexcept nogil
    Loops loops_for(const Job&)
    void spread(const double*, double*, Py_ssize_t, Py_ssize_t, Py_ssize_t)
    void fence()
    void prefetch_to_write(const void* p)
