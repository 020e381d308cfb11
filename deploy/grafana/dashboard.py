"""Grafana's dashboard as code: `python -m deploy.grafana.dashboard` writes dashboards/flux.json."""

from pathlib import Path

from grafana_foundation_sdk.builders import (
    barchart,
    dashboard,
    heatmap,
    prometheus,
    stat,
    table,
    timeseries,
)
from grafana_foundation_sdk.builders.heatmap import HeatmapColorOptions
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import StackingMode
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    DataTransformerConfig,
    VariableRefresh,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

FILE = Path(__file__).parent / "dashboards" / "flux.json"

SOURCE = DataSourceRef(type_val="prometheus", uid="prometheus")
CHOSEN = 'model_name=~"$model",instance=~"$instance"'
HALF, THIRD = 12, 8
"""Widths, of 24."""


def decisions(by: str, window: str, route: str = "") -> str:
    """Sum route decisions: those of one route, or all."""
    labels = f'{CHOSEN},route="{route}"' if route else CHOSEN
    function = "increase" if window == "$__range" else "rate"
    return f"sum by ({by}) ({function}(flux_route_decisions_total{{{labels}}}[{window}]))"


def sparse_share(by: str) -> str:
    """Write the share of decisions that were SPARSE; nothing where nothing was decided."""
    window = "$__rate_interval"
    return f"{decisions(by, window, 'sparse')} / ({decisions(by, window)} > 0)"


def two_digits(expression: str) -> str:
    """Pad layer numbers, which are sorted as text."""
    return f'label_replace({expression}, "layer", "0$1", "layer", "(.)")'


def quantile(share: float, metric: str) -> str:
    """Write a quantile of a histogram."""
    rate = f"rate({metric}_bucket{{{CHOSEN}}}[$__rate_interval])"
    return f"histogram_quantile({share}, sum by (le) ({rate}))"


def query(expression: str, legend: str = "", ref: str = "A") -> prometheus.Dataquery:
    """Ask for a value at each time."""
    return prometheus.Dataquery().ref_id(ref).expr(expression).legend_format(legend).range()


def now(expression: str, ref: str = "A") -> prometheus.Dataquery:
    """Ask for a table of the values at the end of the time range."""
    return query(expression, ref=ref).instant().format(PromQueryFormat.TABLE)


def lines(title: str, unit: str, *targets: prometheus.Dataquery) -> timeseries.Panel:
    """Draw values over time."""
    panel = timeseries.Panel().title(title).unit(unit).datasource(SOURCE).height(8).span(HALF)
    for target in targets:
        panel = panel.with_target(target)
    return panel.max(1).min(0) if unit == "percentunit" else panel.min(0)


def heat_map(title: str, color: HeatmapColorOptions) -> heatmap.Panel:
    """Draw a heat map of rows that the query gives, also of cells that are 0."""
    return (
        heatmap.Panel()
        .title(title)
        .datasource(SOURCE)
        .height(12)
        .span(HALF)
        .calculate(False)
        .filter_values(heatmap.FilterValueRange().le(-1))
        .color(color.mode(HeatmapColorMode.SCHEME).scheme("Viridis"))
    )


def route_panels() -> list:
    """Make the panels of flux's own metrics."""
    ratio = f"rate(flux_request_sparse_layers_ratio_bucket{{{CHOSEN}}}[$__rate_interval])"
    attended, context = (
        f"sum by (phase) (rate(flux_{what}_tokens_total{{{CHOSEN}}}[$__rate_interval]))"
        for what in ("attended", "context")
    )
    per_layer = barchart.Panel().title("FULL and SPARSE per layer, in the time range")
    renamed = {"Value #A": "FULL", "Value #B": "SPARSE"}
    columns = {"excludeByName": {"Time": True}, "renameByName": renamed}
    return [
        lines(
            "Share of SPARSE route decisions",
            "percentunit",
            query(sparse_share("model_name, instance"), "{{model_name}} {{instance}}"),
        ),
        lines(
            "KV reading saved, of what full attention reads",
            "percentunit",
            query(f"1 - {attended} / ({context} > 0)", "{{phase}}"),
        ),
        heat_map("Share of SPARSE, by layer", HeatmapColorOptions().min(0).max(1))
        .unit("percentunit")
        .with_target(query(two_digits(sparse_share("layer")), "{{layer}}")),
        heat_map("Requests by their share of SPARSE layers", HeatmapColorOptions()).with_target(
            query(f"sum by (le) ({ratio})", "{{le}}").format(PromQueryFormat.HEATMAP)
        ),
        per_layer.datasource(SOURCE)
        .height(8)
        .span(16)
        .x_field("layer")
        .stacking(StackingMode.NORMAL)
        .with_target(now(two_digits(decisions("layer", "$__range", "full"))))
        .with_target(now(two_digits(decisions("layer", "$__range", "sparse")), "B"))
        .with_transformation(DataTransformerConfig(id_val="merge", options={}))
        .with_transformation(DataTransformerConfig(id_val="organize", options=columns)),
        defects(),
        table.Panel()
        .title("Router in use")
        .datasource(SOURCE)
        .height(4)
        .span(24)
        .with_target(now(f"flux_router_info{{{CHOSEN}}}")),
    ]


def defects() -> stat.Panel:
    """Make the panel of what should stay 0."""
    panel = stat.Panel().title("Should be 0, in the time range").datasource(SOURCE).height(8)
    for ref, name, legend in (
        ("A", "flux_unrouted_rows_total", "rows without a route"),
        ("B", "flux_nonfinite_router_rows_total", "requests with non-finite logits"),
        ("C", "flux_unread_prompts_total", "prompts that are no token ids"),
    ):
        expression = f"sum(increase({name}{{{CHOSEN}}}[$__range]))"
        panel = panel.with_target(query(expression, legend, ref).instant())
    return panel.span(THIRD)


def memory_panels() -> list:
    """Make the panels of `free_kv`."""
    freed = f"sum(rate(flux_kv_blocks_freed_total{{{CHOSEN}}}[$__rate_interval]))"
    admitted = f"sum(rate(flux_kv_admitted_requests_total{{{CHOSEN}}}[$__rate_interval]))"
    held = (
        query(quantile(share, "flux_request_kv_bytes"), f"p{100 * share:g}", ref)
        for ref, share in (("A", 0.5), ("B", 0.95))
    )
    return [
        lines("KV blocks given back a second", "short", query(freed, "by living requests")).span(
            THIRD
        ),
        lines("KV memory a request held at its end", "bytes", *held).span(THIRD),
        lines("Requests admitted thanks to it a second", "short", query(admitted, "admitted")).span(
            THIRD
        ),
    ]


def server_panels() -> list:
    """Make the panels of vLLM's own metrics."""
    panels = []
    for title, metric in (
        ("Time to first token", "time_to_first_token_seconds"),
        ("Time per output token", "request_time_per_output_token_seconds"),
    ):
        targets = [
            query(quantile(share, f"vllm:{metric}"), f"p{100 * share:g}", ref)
            for ref, share in (("A", 0.5), ("B", 0.95), ("C", 0.99))
        ]
        panels.append(lines(title, "s", *targets))

    def rate(metric: str) -> str:
        return f"sum(rate(vllm:{metric}{{{CHOSEN}}}[$__rate_interval]))"

    def total(metric: str) -> str:
        return f"sum(vllm:{metric}{{{CHOSEN}}})"

    cache = query(f"max by (instance) (vllm:kv_cache_usage_perc{{{CHOSEN}}})", "{{instance}}")
    return [
        *panels,
        lines(
            "Tokens a second",
            "short",
            query(rate("prompt_tokens_total"), "prompt"),
            query(rate("generation_tokens_total"), "generated", "B"),
        ).span(THIRD),
        lines(
            "Requests",
            "short",
            query(total("num_requests_running"), "running"),
            query(total("num_requests_waiting"), "waiting", "B"),
        ).span(THIRD),
        lines("KV cache in use", "percentunit", cache).span(THIRD),
    ]


def build() -> str:
    """Return the dashboard as Grafana's JSON."""
    board = (
        dashboard.Dashboard("Flux-vLLM: routes and server")
        .uid("flux-vllm")
        .tags(["vllm", "flux"])
        .refresh("15s")
        .time("now-1h", "now")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .timezone("browser")
    )
    for name, label, labels_of in (
        ("model", "Model", "flux_router_info"),
        ("instance", "Instance", 'flux_router_info{model_name=~"$model"}'),
    ):
        key = "model_name" if name == "model" else "instance"
        variable = dashboard.QueryVariable(name).label(label).datasource(SOURCE)
        variable = variable.query(f"label_values({labels_of}, {key})").multi(True)
        variable = variable.include_all(True).all_value(".+")
        board = board.with_variable(variable.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED))
    for title, panels in (
        ("Routes", route_panels()),
        ("KV memory", memory_panels()),
        ("Server", server_panels()),
    ):
        board = board.with_row(dashboard.Row(title))
        for panel in panels:
            board = board.with_panel(panel)
    return JSONEncoder(sort_keys=True, indent=2).encode(board.build()) + "\n"


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(build())
