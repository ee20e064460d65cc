// Package kubernetes tests configs/helm and configs/kubernetes with helm, as other people wrote
// it, and with Kubernetes' own types: what is rendered is what a cluster would take.
package kubernetes
