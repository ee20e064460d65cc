// Package configs has the files that are shipped beside the programs, so that a program that
// installs them needs no others.
package configs

import "embed"

//go:embed systemd/erofsd.service systemd/containerd-erofsd-grpc.service containerd/*.toml
var files embed.FS

// File returns a file of this folder by its path in it, such as systemd/erofsd.service. Only
// the units of erofsd and the snapshotter and the files for containerd are there; for any
// other name the error is fs.ErrNotExist.
func File(name string) ([]byte, error) { return files.ReadFile(name) }
