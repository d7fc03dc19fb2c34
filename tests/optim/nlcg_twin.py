"""A slow, literal NumPy twin of NLCG on one flat float64 vector: the oracle of the fast implementations."""

from __future__ import annotations

import numpy as np

EPS = 1e-8
LADDER = (
    (0.15, 0.5, 0.9),
    (0.125, 0.7, 0.7),
    (0.10, 0.8, 0.5),
    (0.075, 0.9, 0.3),
    (0.05, 0.95, 0.2),
    (0.025, 0.975, 0.1),
)


class Twin:
    """The published program line by line (mode "reference"), or with the repairs of mode "exact"."""

    def __init__(
        self, w, *, rule="fr", precond="bfgs", mode="exact", line_search="none", period=5, threshold=1.0, removal=None
    ):
        self.w = np.array(w, dtype=np.float64)
        self.rule, self.precond, self.mode = rule, precond, mode
        self.line_search, self.period, self.threshold = line_search, period, threshold
        self.removal = removal or ("previous" if mode == "exact" else "current")
        self.h = np.ones_like(self.w)
        self.g_prev = self.d = self.z_prev = np.zeros_like(self.w)
        self.t, self.rho_prev, self.base, self.ema, self.ema_prev = 0, 0.0, 1.0, 0.0, 0.0
        self.tau_prev, self.altered, self.beta = 0.0, False, 0.0

    def step(self, g, lr, loss=None):
        g = np.asarray(g, dtype=np.float64)
        exact = self.mode == "exact"
        P = self._precondition(g, lr)
        z = -P * g
        rho = g @ (P * g)
        d_old = self.d
        if self.t == 0:
            self.beta, self.d = 0.0, z
        else:
            num = rho if self.rule == "fr" else rho - (-g) @ self.z_prev
            den = self.rho_prev if exact else self.rho_prev + EPS
            self.beta = float(np.clip(num / den, 0, 1)) if den > 0 else 0.0
            self.d = z + self.beta * self.d
        self.rho_prev, self.z_prev, self.g_prev = rho, z, g
        base_old = self.base
        self.w = self.w + self._move(lr, loss, d_old)
        self.tau_prev = lr * self.base
        self.t += 1
        return base_old

    def _precondition(self, g, lr):
        if self.precond == "none" or self.t == 0:
            return np.ones_like(g)
        exact, h = self.mode == "exact", self.h
        y, s = g - self.g_prev, (self.tau_prev if exact else lr * self.base) * self.d
        a, b = y @ s, h @ s**2
        if exact and not self.altered and a > 1e-8 * np.linalg.norm(y) * np.linalg.norm(s) and b > 0:
            self.h = np.clip(h - h**2 * s**2 / b + y**2 / a, 1e-6, 1e6)
        if not exact and not (a < EPS or b < EPS):
            self.h = np.abs(h - (h**2 * s**2 + EPS) / (b + EPS) + (y**2 + EPS) / (a + EPS))
        return 1 / self.h if exact else 1 / (self.h + EPS)

    def _move(self, lr, loss, d_old):
        base_old = self.base
        kappa, omega = self._search(loss)
        self.altered = omega > 0
        if kappa is not None:
            self.base = max(kappa * base_old, 1e-4)
        T, T_old = lr * self.base, (self.tau_prev if self.mode == "exact" else lr * base_old)
        if kappa is None or T <= EPS:
            return T * self.d
        old = self.d if self.removal == "current" else d_old
        return (1 - omega) * T * self.d - omega * T_old * old

    def _search(self, loss):
        """(factor on the base, part to remove) of a degradation; (None, 0) when nothing is taken back."""
        if self.line_search == "none":
            return None, 0.0
        self.ema = loss if self.t == 0 else 0.7 * self.ema + 0.3 * loss
        if self.t == 0:
            self.ema_prev = self.ema
            return None, 0.0
        if self.line_search == "online":
            r, recovery = loss / self.ema, 1.02
        elif self.t % self.period:
            return None, 0.0
        else:
            r, recovery = self.ema / self.ema_prev, 1.05
            self.ema_prev = self.ema
        if r < 1 + 0.01 * self.threshold:
            self.base = min(1.0, self.base * recovery)
            return None, 0.0
        for edge, kappa, omega in LADDER:
            if r > 1 + edge * self.threshold:
                return kappa, omega
        return 1.0, (0.1 if r > 1 + 0.01 * self.threshold else 0.0)
