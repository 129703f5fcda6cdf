"""How threadpoolctl finds and sets the number of threads, where it is installed."""

from threadpoolctl import LibController, register


class FastbnController(LibController):  # type: ignore[misc]
    """The pool of `pool.hpp`, as threadpoolctl asks for it."""

    user_api = "fastbn"
    internal_api = "fastbn"
    filename_prefixes = ("pool",)
    check_symbols = ("fastbn_get_num_threads", "fastbn_set_num_threads")

    def get_num_threads(self) -> int:
        """Return how many threads a call may use."""
        return int(self.dynlib.fastbn_get_num_threads())

    def set_num_threads(self, num_threads: int) -> None:
        """Set how many threads a call may use."""
        self.dynlib.fastbn_set_num_threads(num_threads)

    def get_version(self) -> str:
        """Return the version of fastbn."""
        from fastbn import __version__

        return __version__


register(FastbnController)
