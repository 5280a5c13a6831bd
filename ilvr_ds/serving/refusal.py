"""Why a request is not answered, in the JSON form of OpenAI's errors."""

from __future__ import annotations

from typing import Any

from ilvr_ds.errors import OneLineError

_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class RefusedError(OneLineError):
    """A request that is not answered. `status` is HTTP's; `param` the key that is to blame, `code` a name for it."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
