// Package monitoring tests configs/grafana and configs/prometheus: Prometheus' own parser reads
// every expression, and what it asks for is what the programs export.
package monitoring
