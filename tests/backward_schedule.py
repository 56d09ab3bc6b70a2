"""A simulation of backward_sm90's schedule, to hold the plan's closed form against.

Clusters take items in the order of backward_order.h. An item has its clocks by the constants of
docs/fused_gemm.md; items of dy and x share what memory delivers, and slow down together.
"""

from __future__ import annotations

CLOCK, MEMORY, STREAM, PORT = 1.6e9, 3.0e12, 51.0, 128.0  # 1/s, bytes/s, bytes a clock
ITEM, LATENCY, FLAG, LAUNCH, ZERO, DROPOUT = 2000.0, 800.0, 1500.0, 1.5e-6, 1e-6, 390.0
ROWS = 512  # of a chunk
DY, DX, SUM_B, X, SUM_A = range(5)


def tile_cycles(columns: int, steps: int) -> float:
    shared = (2 * (2048 + 32 * columns) + 32 * (128 + columns)) / PORT
    return steps * max(columns, shared) / 0.865 + 6 * columns


def up(a: int, b: int) -> int:
    return -(-a // b)


class Call:
    """One grid of a call, with the items' clocks of a cluster and bytes of memory."""

    def __init__(self, m: int, n: int, k: int, r: int, masked: bool, tile_n: int, clusters=66):
        self.pairs, self.columns, self.clusters = up(m, 256), up(k, tile_n), clusters
        self.chunks = up(self.pairs, 2)
        group = up(self.pairs, up(self.pairs, 8))
        self.group = min(group + group % 2, self.pairs)
        of_slice = max(8, up(up(k, 64), 8))
        self.slices, pitch = up(up(k, 64), of_slice), up(r, 4) * 4
        turns = max(1, max(n, k) * pitch // (4 * 512 * 2 * clusters))
        rows = max(1, 4 * 512 * turns // pitch)
        self.sums_b, self.sums_a = up(n, rows), up(min(k, of_slice * 64), rows)

        rank = 16 if r <= 16 else 64
        product, stage, down = 8 * (2048 + 32 * rank), 128 * 128, rank * 128
        dy = max((stage + down) / STREAM, (2 * product + stage + down) / PORT)
        x = max(stage / STREAM, (product + stage) / PORT) + DROPOUT * masked
        chunk = 2 * 2 * 128 * rank / STREAM + ITEM
        total = ITEM + up(2 * self.chunks, 8) * LATENCY
        frozen = tile_cycles(tile_n, up(n, 16))
        tile = tile_cycles(tile_n, up(n, 16) + up(r, 16))
        if masked:
            tile = frozen + tile_n / 16 * (120 + 16 * up(r, 16))
        self.clocks = {
            DY: 2 * up(n, 64) * dy + chunk, DX: tile, X: 2 * of_slice * x + chunk,
            SUM_B: total, SUM_A: total,
        }  # fmt: skip
        self.bytes = {  # what is read, and the partial results
            DY: 2 * ROWS * n + 2 * n * pitch * 4, X: (2 * ROWS + 2 * pitch * 4) * of_slice * 64,
        }  # fmt: skip
        self.frozen = up(self.pairs * self.columns, clusters) * frozen
        self.head = FLAG + (ZERO + LAUNCH * (r <= 16)) * CLOCK

    def overhead(self, emulated) -> float:
        """Over the frozen GEMM of dx: 0.01 is 1 %."""
        first = self.chunks <= (self.clusters + 3) // 4
        order = emulated.backward_order(
            self.pairs, self.columns, self.group, first, self.sums_b, self.slices, self.sums_a
        )
        return (self._clocks(iter(order)) + self.head) / self.frozen - 1

    def _clocks(self, order) -> float:
        now, dh, dy_done, x_done = 0.0, set(), 0, [0] * self.slices
        work = [self._take(order) for _ in range(self.clusters)]

        def waits(item) -> bool:
            what, pair, _, part, index = item[0]
            if what == X:
                return 2 * index not in dh
            if what == DX:  # at its end
                return item[1] <= 1e-6 and pair // 2 * 2 not in dh
            return (what == SUM_B and dy_done < self.chunks) or (
                what == SUM_A and x_done[part] < self.chunks
            )

        while any(work):
            done = [i for i, w in enumerate(work) if w and w[1] <= 1e-6 and not waits(w)]
            for i in done:
                what, pair, _, part, _ = work[i][0]
                if what == DY:
                    dh.add(pair)
                    dy_done += 1
                elif what == X:
                    x_done[part] += 1
                work[i] = self._take(order)
            if done:
                continue
            active = [w for w in work if w and w[1] > 1e-6 and not waits(w)]
            demand = sum(w[2] for w in active)  # bytes a clock
            speed = min(1.0, MEMORY / CLOCK / demand) if demand else 1.0
            step = min(w[1] / (speed if w[2] else 1.0) for w in active)
            for w in active:
                w[1] -= step * (speed if w[2] else 1.0)
            now += step
        return now

    def _take(self, order) -> list | None:
        """[place, clocks that are left, bytes a clock at full speed] of the next item."""
        place = next(order, None)
        if place is None:
            return None
        clocks = self.clocks[place[0]]
        return [place, clocks, self.bytes.get(place[0], 0) / clocks]
