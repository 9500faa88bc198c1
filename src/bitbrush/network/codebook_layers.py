"""Layers whose weight is stored as additive codebooks: a `QuantLayer` with other codes and tables (VQDM, AQLM).

    W[i, J_j] = scale[i] * (C_1[c_ij1] + ... + C_K[c_ijK])

All faces decode with `bitbrush.numbers.codebook.decode`, the one definition, from codes and from codebooks and scales
that are rounded to float16 when they are stored; so packed equals simulated bit for bit. The packed face decodes at
every forward and keeps no float weight.

Tensors of a packed layer (see docs/format.md), N rows, n input channels times kernel positions, K codebooks of B bits:

    codes{B}           uint8 [K, bytes]         the N * n / g codes of each codebook, planar
    weight_scale       float16 [N]
    codebooks.values   float16 [K, 2**B, g]     unless the set is shared: see `bitbrush.network.codebooks`

``LayerSpec.input_scale`` works as in any layer: the codes are those of ``W / input_scale``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from bitbrush.errors import InternalError
from bitbrush.network.codebooks import Codebooks
from bitbrush.network.layers import QuantConv2d, QuantLayer, QuantLinear
from bitbrush.numbers.codebook import decode, from_groups, index_bytes, pack_codes, to_half, unpack_codes
from bitbrush.numbers.grid import WeightSpec


class CodebookLayer(QuantLayer):
    """What `CodebookLinear` and `CodebookConv2d` share.

    ``codes`` are uint8 ``[N, G, K]`` until the layer is packed. While a step trains it puts scales ``[N]`` into
    ``trial_scale`` and codebooks into ``book().trial``; the sim face decodes with them, unrounded, and gradients reach
    both.
    """

    codebooks: Codebooks | None

    def _declare_tables(self, spec: WeightSpec) -> None:
        self.trial_scale: Tensor | None = None
        self._shared: tuple[Codebooks | None] = (None,)  # in a tuple: shared by layers, owned by the model
        self.codebooks = None if spec.shared else Codebooks(spec.table_shape)
        self.register_buffer("weight_scale", torch.ones(self.out_channels_, dtype=torch.float16))

    @property
    def weight_spec(self) -> WeightSpec:
        """The weight's spec, which such a layer always has."""
        if self.spec.weight is None:
            raise InternalError("a layer of additive codebooks without weight spec", where=type(self).__name__)
        return self.spec.weight

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """``[N, C]``, or ``[N, C, kh, kw]``."""
        kernel = self.kernel_hw if isinstance(self, nn.Conv2d) else ()
        return (self.out_channels_, self.in_channels_, *kernel)

    @property
    def code_shape(self) -> tuple[int, int, int]:
        """Shape of the unpacked codes, ``[N, G, K]``."""
        spec, (high, wide) = self.weight_spec, self.kernel_hw
        return (self.out_channels_, self.in_channels_ * high * wide // spec.group, spec.codebooks)

    # ---- codebooks ---------------------------------------------------------------------------------------------
    def share(self, codebooks: Codebooks) -> None:
        """Use a set that the model owns."""
        self._shared = (codebooks,)
        if self.face == "packed":
            codebooks.fix()

    def book(self) -> Codebooks:
        """The set of codebooks that the layer is decoded with, its own or the shared one."""
        found = self.codebooks if self.codebooks is not None else self._shared[0]
        if found is None:
            raise InternalError(f"the layer has not been given its codebooks {self.weight_spec.shared!r}",
                                where=type(self).__name__)
        return found

    # ---- weight ------------------------------------------------------------------------------------------------
    def set_codes(self, codes: Tensor, codebooks: Tensor | None, scale: Tensor) -> None:
        """Store the weight; codebooks and scale are rounded to float16, as every face will use them.

        Args:
            codes: ``[N, G, K]``, integers below 2**B.
            codebooks: ``[K, 2**B, g]``, of a shared set for all its layers; None: they stay as they are.
            scale: ``[N]``.

        Raises:
            InternalError: Other shapes or codes; the set is one that a packed layer uses, and would change.
            NumericsError: A codebook or scale is not finite in float16.
        """
        device = self.weight_scale.device
        codes = codes.detach().to(device)
        fits = codes.shape == self.code_shape and scale.shape == self.weight_scale.shape
        if not fits or int(codes.min()) < 0 or int(codes.max()) >= self.weight_spec.grid.levels:
            raise InternalError(
                "these are not the layer's codes and scales", where=type(self).__name__,
                why=f"{list(codes.shape)} and {list(scale.shape)} given, {list(self.code_shape)} below "
                f"{self.weight_spec.grid.levels} and {list(self.weight_scale.shape)} expected",
            )
        table = to_half(scale).to(device)
        if codebooks is not None:
            self.book().set(codebooks)
        self.codes = codes.to(torch.uint8).clone(memory_format=torch.contiguous_format)
        self.weight_scale = table.clone()

    def set_weight(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        """Refused: the codes of this layer are numbers of codewords."""
        raise InternalError("a layer of additive codebooks has no scale and zero-point for each segment",
                            where=type(self).__name__, try_="set_codes(codes, codebooks, scale)")

    def scale_tables(self) -> tuple[Tensor, Tensor]:
        """Refused, as `set_weight`."""
        raise InternalError("a layer of additive codebooks has no zero-point", where=type(self).__name__)

    def top(self) -> int | Tensor:
        """Refused: codes have no order, so none is the largest."""
        raise InternalError("codes of additive codebooks have no largest value", where=type(self).__name__)

    def weight_tables(self) -> tuple[Tensor, Tensor]:
        """Copies of what turns codes into the weight: codebooks ``[K, 2**B, g]`` and scale ``[N]``, float16."""
        return self.book()().clone(), self.weight_scale.clone()

    def take_weight(self, former: QuantLayer) -> None:
        """Store the codes and tables of another layer with the same weight spec, if it has any."""
        if isinstance(former, CodebookLayer) and former.codes is not None:
            self.set_codes(former.codes, former.book()(), former.weight_scale)

    def stored_codes(self) -> Tensor:
        """The weight's codes ``[N, G, K]`` uint8, from the packed bytes once packed."""
        if self.codes is not None:
            return self.codes
        if self.face != "packed":
            raise InternalError("the layer has no codes yet", where=type(self).__name__)
        bits, (rows, groups, _) = self.weight_spec.grid.bits, self.code_shape
        return unpack_codes(getattr(self, f"codes{bits}"), bits, rows, groups)

    def decoded_weight(self) -> Tensor:
        """Weight that the sim and packed faces multiply with, from the stored tables: float32."""
        return self._decode(self.book()(), self.weight_scale)

    def weight_in_use(self) -> Tensor:
        """The weight of the sim face: the trial weight, or decoded with the trial tables where there are any."""
        if self.trial_weight is not None:
            return self.trial_weight
        books = self.book().trial
        scale = self.trial_scale
        return self._decode(self.book()() if books is None else books, self.weight_scale if scale is None else scale)

    def _decode(self, books: Tensor, scale: Tensor) -> Tensor:
        codes = self.stored_codes()
        return from_groups(decode(codes, books.to(codes.device), scale), self.weight_shape)

    # ---- packing -----------------------------------------------------------------------------------------------
    def declare_packed(self, device: torch.device | str | None = None) -> None:
        """Create the packed buffer with its final shape (uninitialised) and show the packed face."""
        bits, (rows, groups, count) = self.weight_spec.grid.bits, self.code_shape
        shape = (count, index_bytes(rows * groups, bits))
        self.register_buffer(f"codes{bits}", torch.empty(shape, dtype=torch.uint8, device=device))
        self._finish_packing()

    def _finish_packing(self) -> None:
        super()._finish_packing()
        self.trial_scale = None
        if self.codebooks is not None or self._shared[0] is not None:
            self.book().fix()

    def pack(self) -> None:
        """Pack the stored codes and free the float weight. The bytes hold exactly `stored_codes`."""
        bits, codes = self.weight_spec.grid.bits, self.stored_codes()
        self.book()  # a layer without its set must not lose its codes
        self.declare_packed(device=codes.device)
        setattr(self, f"codes{bits}", pack_codes(codes, bits))
        self.float_weight = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move, but scales stay float16: in bfloat16 the packed weight would be another one."""
        before = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != before.dtype:
            self.weight_scale = before.to(self.weight_scale.device)
        return self


class CodebookLinear(CodebookLayer, QuantLinear):  # type: ignore[misc, override]
    """`torch.nn.Linear` whose weight is additive codebooks."""


class CodebookConv2d(CodebookLayer, QuantConv2d):  # type: ignore[override]
    """`torch.nn.Conv2d` whose weight is additive codebooks; a group is channels at one kernel position."""
