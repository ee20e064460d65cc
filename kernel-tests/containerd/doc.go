// Package containerd has the end-to-end tests of the snapshotter: containerd and runc as
// processes, with containerd-erofsd-grpc and erofsd beside them, images from a
// docker-registry, and containers and pods that read them. Everything is tried below Debian's
// containerd 1.6 and below containerd 2, with the configurations of configs/containerd.
package containerd
