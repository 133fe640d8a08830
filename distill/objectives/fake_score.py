"""What the fake score learns from the student's samples, clean or at a level s > 0.

At s > 0 part of the noise in x_t is the student's own.

x_s: the compared point (B, ...), s its level (B,). xi: the fresh noise that took it to x_t = a x_s + b xi, a and b of
`NoiseProcess.kernel`. All elementwise squared errors of the fake score's raw output, (B, ...).
"""

from torch import Tensor

from fewstep.samplers.noise import NoiseProcess, expand


def subinterval_error(output: Tensor, x_s: Tensor, xi: Tensor, s: Tensor, t: Tensor, noise: NoiseProcess) -> Tensor:
    """(b / sigma_t)^2 (output - o*)^2, where o* is the output for eps* = sigma_t xi / b and x0* = (x_t - sigma_t eps*) / alpha_t.

    Whatever the law of x_s, score(x_t) = E[-xi / b | x_t]: only xi is independent of x_s. By Tweedie's identity the
    minimiser is the denoiser of that law. Var(eps* | x_s) = sigma_t^2 / b^2 grows without bound as t falls to s, which
    the weight undoes: of epsilon this is regression of xi on b eps / sigma_t, and nothing is divided by b. At s = 0 all
    are the plain targets with weight 1.
    """
    alpha_s, sigma_s = noise.levels(s, x_s)
    alpha_t, sigma_t = noise.levels(t, x_s)
    weight = noise.kernel(s, t, x_s)[1] / sigma_t
    # x0* without a division by alpha_t, which is 0 at the top of zero terminal SNR
    x0 = weight / alpha_s * x_s - alpha_t * (sigma_s / alpha_s).square() / sigma_t * xi
    return (weight * output - noise.output(x0, xi, t)).square()


def x0_hat_error(
    output: Tensor, x_t: Tensor, x0_hat: Tensor, xi: Tensor, t: Tensor, noise: NoiseProcess, limit: float = 5.0
) -> Tensor:
    """TDM's published regression on the student's x0_hat, weighted min(SNR, 5) exp(mean (xi^2 - n^2) / 2).

    n = (x_t - alpha_t x0_hat) / sigma_t is the whole noise in x_t. Biased at s > 0, where it depends on x0_hat: the
    minimiser E[x0_hat | x_t] is not the denoiser of the law of x_t. At s = 0 n is xi, and the two targets are one.
    """
    alpha, sigma = noise.levels(t, x_t)
    n = noise.eps_of_x0(x0_hat, x_t, t)
    importance = ((xi.square() - n.square()).flatten(1).mean(1) / 2).exp()
    weight = (alpha / sigma).square().clamp(max=limit) * expand(importance, x_t)
    return weight * (noise.x0(output, x_t, t) - x0_hat).square()


def reweighted(error: Tensor, t: Tensor, noise: NoiseProcess, weight: str) -> Tensor:
    """Squared errors of the `output` with the weight that makes them those of `epsilon`, or of `alpha_epsilon`.

    A VP's v is off by 1 / alpha times epsilon; a flow's velocity keeps its own scale.
    """
    alpha = expand(noise.alpha(t), error)
    if weight != "output" and noise.prediction_type == "v_prediction":
        error = alpha.square() * error
    return alpha.square() * error if weight == "alpha_epsilon" else error
