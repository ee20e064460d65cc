// Package containerd has the end-to-end tests of the snapshotter: Debian's containerd and
// runc as processes, with containerd-erofsd-grpc and erofsd beside them, images from a
// docker-registry, and containers that read them.
package containerd
