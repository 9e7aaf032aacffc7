"""A whole training step as a CUDA graph: hundreds of kernels and products by one launch."""

from ...cuda import out_of_memory


class Graph:
    """What a function gives the device to do, recorded once and launched again and again.

    The function reads and writes arrays that stay where they are. What it allocates comes from a
    pool of its own, since the graph goes on using memory that the function has freed.
    """

    def __init__(self, xp, function):
        self.pool, stream = xp.cuda.MemoryPool(), xp.cuda.Stream(non_blocking=True)
        xp.cuda.get_current_stream().synchronize()
        with stream, xp.cuda.using_allocator(self.pool.malloc), out_of_memory():
            function()  # compiles and allocates what a recording cannot
            stream.synchronize()
            stream.begin_capture()
            try:
                self.results = function()
            finally:
                self._graph = stream.end_capture()

    def launch(self, stream):
        """Does it all again. The results of the last time are overwritten."""
        self._graph.launch(stream)
