cdef size_t cache_size() noexcept nogil  # bytes of the last-level cache
