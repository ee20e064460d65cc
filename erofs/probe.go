package erofs

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/erofsd/erofsd/internal/kernel"
)

// Supported returns nil when EROFS images can be mounted from files in directory
// dir, which should be where the cache is: not every file system can be below.
// It mounts an image of a few blocks with one device and reads a file of it;
// the mount is never attached to the file tree. The error is
// [kernel.ErrNotSupported] when kernel or file system cannot; any other means
// that it could not be tried, for lack of rights for example. Files are made in
// dir and removed.
func Supported(dir string) error {
	const feature = "EROFS mounts from files"
	err := probe(dir)
	var missing string
	switch {
	case err == nil:
		return nil
	case errors.Is(err, syscall.ENODEV):
		missing = "CONFIG_EROFS_FS"
	case errors.Is(err, syscall.ENOTBLK):
		missing = "CONFIG_EROFS_FS_BACKED_BY_FILE, and a cache directory on a disk file system such as ext4 or xfs"
	case errors.Is(err, syscall.ENOSYS):
		missing = "the mount calls of linux 5.2"
	case errors.Is(err, syscall.EINVAL), errors.Is(err, syscall.EOPNOTSUPP):
		missing = "EROFS with devices, and a cache directory on a disk file system such as ext4 or xfs"
	default:
		return fmt.Errorf("probe %s: %w", feature, err)
	}
	return &kernel.UnsupportedError{
		Feature: feature, Missing: missing, Since: kernel.Version{Major: 6, Minor: 12}, Err: err,
	}
}

func probe(dir string) (err error) {
	tmp, err := os.MkdirTemp(dir, "erofs-probe-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()
	want := bytes.Repeat([]byte("erofsd! "), blockSize/8)
	source, device := filepath.Join(tmp, "image"), filepath.Join(tmp, "device")
	image, err := probeImage()
	if err != nil {
		return err
	}
	if err := errors.Join(os.WriteFile(source, image, 0o600), os.WriteFile(device, want, 0o600)); err != nil {
		return err
	}
	fd, err := detachedMount(MountOptions{Source: source, Devices: []string{device}})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, syscall.Close(fd)) }()
	got := make([]byte, blockSize)
	if err := readInMount(fd, "probe", got); err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return errors.New("the kernel reads other bytes from the device than it holds")
	}
	return nil
}

// probeImage returns an image with one file of one block in one device.
func probeImage() ([]byte, error) {
	b := Blob{
		ID: strings.Repeat("0", idSize), Size: blockSize,
		Chunks: []ChunkInfo{{Len: blockSize, CLen: blockSize}},
	}
	le.PutUint32(b.Entry[68:], minChunkSize)
	le.PutUint32(b.Entry[72:], 1)
	le.PutUint64(b.Entry[96:], blockSize)
	root := &Node{Mode: typeDir | 0o755, Children: map[string]*Node{
		"probe": {Mode: typeReg | 0o644, Size: blockSize, Chunks: []ChunkRef{{}}},
	}}
	var out bytes.Buffer
	err := Write(&out, root, WriteOptions{Blobs: []Blob{b}, ChunkSize: minChunkSize})
	return out.Bytes(), err
}
