"""How much of a prompt goes into one step."""


class PrefillPace:
    """Sizes the pieces of prompts so that a step takes about as long as it may.

    A step of n tokens takes about a + b * n seconds. Multiplying n by how far the last step was from the
    wanted time converges to it from either side, whatever the machine and the model, and follows when
    contexts grow or the machine slows down.
    """

    FEWEST = 4  # a prompt gets so many even where steps take too long already, or it would never be done
    _MOST = 512

    def __init__(self, seconds: float) -> None:
        """Aim at steps of `seconds`, from below."""
        self._seconds = seconds
        self._size = float(self.FEWEST)

    @property
    def tokens(self) -> int:
        """Tokens that the next step may hold."""
        return int(self._size)

    def record(self, tokens: int, seconds: float) -> None:
        """Learn from a step of so many tokens. A small quick one says nothing about a large one."""
        if tokens < self.tokens and seconds <= self._seconds:
            return
        size = tokens if tokens < self.tokens else max(self._size, tokens)
        ratio = min(2.0, max(0.25, self._seconds / seconds))
        self._size = min(float(self._MOST), max(float(self.FEWEST), size * ratio))
