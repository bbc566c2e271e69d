"""From the profile of a diffusion transformer to a judged plan: sensitivities, search over steps and heads, replay, held-out comparison."""
