"""Rotate queries back: the router sees them as they were before RoPE, vLLM's backend after it."""

from typing import Any

import numpy as np
import torch

from flux_vllm.errors import UnsupportedConfigurationError


class RotaryInverse:
    """The inverse of one rotary embedding, in float32.

    cos and sin are computed anew in float32: vLLM keeps them in the model's dtype. An embedding
    that scales as it rotates (YaRN) is divided by its scale.

    Args:
        rotary: vLLM's rotary embedding module of a layer.
        head_dim: of the queries.
        device: where queries will be.

    With several position axes (M-RoPE) a text's tokens have the same position on each, and are
    rotated as by one.

    Raises: UnsupportedConfigurationError: not a rotation that this class can undo
        (position-dependent tables, an axis that counts otherwise); found by trying it.
    """

    def __init__(self, rotary: Any, head_dim: int, device: torch.device) -> None:
        compute = getattr(rotary, "_compute_cos_sin_cache", None)
        if compute is None:
            raise _unsupported(rotary, "no single table of cos and sin")
        self._table = getattr(rotary, "cos_sin_table", None)
        """Of embeddings without a last position: makes a longer one."""
        self.cos: torch.Tensor
        """[positions, D] float32 on the host, D = rotary_dim / 2."""
        self.sin: torch.Tensor
        try:
            with torch.device("cpu"):
                self._take(compute())
        except (TypeError, AttributeError) as error:
            raise _unsupported(rotary, str(error)) from error
        self.rotary_dim: int = rotary.rotary_dim
        self.interleaved: bool = not rotary.is_neox_style
        if self.cos.shape[-1] * 2 != self.rotary_dim or self.rotary_dim > head_dim:
            raise _unsupported(rotary, f"rotary_dim {self.rotary_dim}, head_dim {head_dim}")
        self._check(rotary, head_dim, device)

    def rows(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Look up cos and sin for `undo`.

        Args:
            positions: [T] int64. Beyond a table of vLLM's, which promises nothing there, they count
                as its last.

        Returns: cos and sin, each [T, D] float32 on the host.
        Host sync: where a table without an end grows, to twice what is asked for.
        """
        last = int(positions.max(initial=0))
        if self._table is not None and last >= len(self.cos):
            self._take(self._table(2 * last))
        index = np.minimum(positions, len(self.cos) - 1)
        return self.cos.numpy()[index], self.sin.numpy()[index]

    def _take(self, table: torch.Tensor) -> None:
        """Take up cos and sin, side by side [positions, 2 D]."""
        cos, sin = table.float().cpu().chunk(2, dim=-1)
        scale = cos.square() + sin.square()
        self.cos, self.sin = (cos / scale).contiguous(), (sin / scale).contiguous()

    def undo(self, query: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Undo the rotation.

        Args:
            query: [..., T, H] float32 after RoPE.
            cos: [T, D] of `rows`, on the query's device.
            sin: [T, D], likewise.

        Returns: [..., T, H] float32 before RoPE.
        Host sync: none. CUDA graph: safe.
        """
        rotated, kept = query[..., : self.rotary_dim], query[..., self.rotary_dim :]
        if self.interleaved:
            x, y = rotated[..., ::2], rotated[..., 1::2]
        else:
            x, y = rotated.chunk(2, dim=-1)
        x, y = x * cos + y * sin, y * cos - x * sin
        pair = torch.stack((x, y), dim=-1) if self.interleaved else torch.stack((x, y), dim=-2)
        return torch.cat((pair.flatten(-2), kept), dim=-1)

    @torch.inference_mode()
    def _check(self, rotary: Any, head_dim: int, device: torch.device) -> None:
        places = np.array([0, 1, len(self.cos) // 2, len(self.cos) - 1])
        positions = torch.from_numpy(places)
        query = torch.randn(len(places), head_dim, generator=torch.Generator().manual_seed(0))
        kept = getattr(rotary, "cos_sin_cache", None)
        given = query.to(device)
        axes = getattr(rotary, "mrope_section", None)
        if axes:
            positions = positions.expand(len(axes), -1)
        try:
            rotated, _ = rotary.forward_native(positions.to(device), given.clone(), given.clone())
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise _unsupported(rotary, str(error)) from error
        finally:
            # forward_native may convert the module's table to this query's dtype and keep it.
            if kept is not None:
                rotary.cos_sin_cache = kept
        if rotated.shape != query.shape:
            raise _unsupported(rotary, f"queries of shape {list(rotated.shape)} come out of it")
        # The module's own table may be bfloat16, 8 bits of mantissa.
        cos, sin = map(torch.from_numpy, self.rows(places))
        error_size = (self.undo(rotated.float().cpu(), cos, sin) - query).abs().max().item()
        if not error_size < 0.1:
            raise _unsupported(rotary, f"rotating back misses by {error_size:.2g}")


def _unsupported(rotary: Any, found: str) -> UnsupportedConfigurationError:
    return UnsupportedConfigurationError(
        "layer routes: expected a rotary embedding with one position per token, found "
        f"{type(rotary).__name__} ({found}); serve this model with vLLM's own attention backend"
    )
