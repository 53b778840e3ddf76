"""Typed access to an untrusted `config.json`."""

from collections.abc import Mapping
from typing import Any

from elutq.errors import ConfigError


class ConfigReader:
    """A config of a model family. Every complaint is a ConfigError that names the key.

    Args:
        config: the parsed JSON, untrusted.
        defaults: values of keys that it leaves out.
        where: what the config is called in errors.
    """

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> None:
        self._config = config
        self._defaults = defaults
        self._where = where

    def get(self, key: str) -> Any:
        """The value, of any type; None if there is none."""
        return self._config.get(key, self._defaults.get(key))

    def integer(self, key: str, high: int, low: int = 1) -> int:
        """A required integer from `low` to `high`."""
        value = self._required(key)
        if type(value) is not int or not low <= value <= high:
            raise ConfigError(
                f"{self._where}: {key} must be an integer from {low} to {high}, not {value!r:.80}"
            )
        return value

    def number(self, key: str, low: float, high: float) -> float:
        """A required number from `low` to `high`."""
        value = self._required(key)
        if type(value) not in (int, float) or not low <= value <= high:
            raise ConfigError(
                f"{self._where}: {key} must be a number from {low:g} to {high:g}, not {value!r:.80}"
            )
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false; false if there is no value."""
        value = self.get(key)
        if value is not None and type(value) is not bool:
            raise ConfigError(f"{self._where}: {key} must be true or false, not {value!r:.80}")
        return bool(value)

    def boolean(self, rule: bool | str) -> bool:
        """A family's rule: the flag of that name, or a fixed answer."""
        return self.flag(rule) if isinstance(rule, str) else rule

    def text(self, key: str) -> str:
        """A required string."""
        value = self._required(key)
        if not isinstance(value, str):
            raise ConfigError(f"{self._where}: {key} must be a string, not {value!r:.80}")
        return value

    def section(self, key: str) -> Mapping[str, Any]:
        """A JSON object; empty if there is no value."""
        value = self.get(key)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise ConfigError(f"{self._where}: {key} must be a JSON object, not {value!r:.80}")
        return value

    def _required(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise ConfigError(f"{self._where} lacks {key}; get the model's complete config.json")
        return value
