"""The dashboard in docs/ asks for metrics that the server has, and for all of them."""

import json
import re
from pathlib import Path

from personatlas.steering.serve.metrics import Metrics

DASHBOARD = json.loads((Path(__file__).parents[2] / "docs" / "grafana.json").read_text())
QUERIES = [target for panel in DASHBOARD["panels"] for target in panel["targets"]]


def test_every_metric_of_the_server_is_on_the_dashboard():
    ends = {"counter": "_total", "histogram": "_bucket", "gauge": ""}
    families = Metrics("mine").registry.collect()
    there = {family.name + ends[family.type] for family in families}
    queried = re.findall(r"personatlas_\w+", " ".join(query["expr"] for query in QUERIES))
    assert {re.sub("_count$", "_bucket", name) for name in queried} == there


def test_queries_group_and_name_by_labels_that_their_metrics_have():
    metrics = Metrics("mine")
    labels = {
        own._name: set(own._labelnames) for own in vars(metrics).values() if hasattr(own, "_labelnames")
    }
    for query in QUERIES:
        used = {
            name.strip() for text in re.findall(r"by \(([^)]*)\)", query["expr"]) for name in text.split(",")
        }
        used |= set(re.findall(r"{{(\w+)}}", query["legendFormat"]))
        metric = next((name for name in labels if name in query["expr"]), "personatlas_model_info")
        known = labels.get(metric, {"model"}) | {"le", "instance"}
        assert used <= known, query


def test_panels_do_not_overlap():
    cells = [
        (panel["gridPos"]["x"] + dx, panel["gridPos"]["y"] + dy)
        for panel in DASHBOARD["panels"]
        for dx in range(panel["gridPos"]["w"])
        for dy in range(panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert all(x < 24 for x, _ in cells)
