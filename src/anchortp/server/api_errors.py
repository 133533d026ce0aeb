"""Every error a client can meet, as OpenAI's error body. Foreign errors are mapped here and nowhere else."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from anchortp.errors import AnchorTPError, CapacityError, EngineFull, EngineStopped, UserError

RETRY_AFTER_S = 1  # a waiting place frees as soon as any running request ends

_TYPES = {429: "rate_limit_error", 400: "invalid_request_error"}


class ApiError(AnchorTPError):
    """An answer other than 2xx. `param` names the offending field, `code` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(message: str, *, param: str | None = None, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, code=code, param=param)


def unavailable(message: str) -> ApiError:
    return ApiError(503, message, code="service_unavailable")


def shutting_down() -> ApiError:
    return unavailable("The server is shutting down. Send the request again, to another server or later.")


def from_engine(error: AnchorTPError) -> ApiError:
    """What the engine or the tokenizer raised, as the client's answer."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineFull):
        return ApiError(429, str(error), code="engine_full", headers={"Retry-After": str(RETRY_AFTER_S)})
    if isinstance(error, EngineStopped | CapacityError):
        return unavailable(str(error))
    if isinstance(error, UserError):
        return invalid(str(error))
    return ApiError(500, str(error), code="internal_error")


def from_validation(error: ValidationError) -> ApiError:
    """The first thing pydantic found wrong with a body."""
    first = error.errors(include_url=False, include_input=False)[0]
    param = ".".join(str(part) for part in first["loc"]) or None
    kind, text = first["type"], first["msg"]
    if kind == "json_invalid":
        return invalid(f"The body is not valid JSON ({text}). Send one JSON object.", code="invalid_json")
    if kind == "extra_forbidden":
        message = f"Unknown parameter: '{param}'. It is not supported here; leave it out."
        return invalid(message, param=param, code="unknown_parameter")
    if kind == "missing":
        return invalid(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    if kind == "unsupported_value":
        return invalid(f"Unsupported value for '{param}': {text}.", param=param, code=kind)
    where = f" for '{param}'" if param else ""
    if kind.endswith("_type"):
        return invalid(f"Invalid type{where}: {text}.", param=param, code="invalid_type")
    return invalid(f"Invalid value{where}: {text}.", param=param)
