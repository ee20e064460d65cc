package harness

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/erofsd/erofsd/kernel-tests/regserver"
)

// Image is a lazy image in a registry.
type Image struct {
	Name  string // repository:tag
	Blobs []ocispec.Descriptor
	Size  int64 // of all blobs, the metadata's included
}

// Publish starts a registry that holds the lazy image of a root file system's tar
// file. The image is converted when the tar file or the converter in bin is new; its
// registry lies beside the tar file.
func Publish(ctx context.Context, bin, tar string, progress func(string)) (*regserver.Server, Image, error) {
	converter, err := os.ReadFile(filepath.Join(bin, "erofsctl"))
	if err != nil {
		return nil, Image{}, fmt.Errorf("%w (make build)", err)
	}
	sum := sha256.Sum256(converter)
	dir := filepath.Join(filepath.Dir(tar), "registry-"+hex.EncodeToString(sum[:6]))
	image := Image{Name: "demo/debian:lazy"}
	if _, err := os.Stat(filepath.Join(dir, "complete")); err != nil {
		if err := publish(ctx, bin, tar, dir, image.Name, progress); err != nil {
			return nil, image, errors.Join(err, os.RemoveAll(dir))
		}
	}
	registry, err := regserver.New(dir)
	if err != nil {
		return nil, image, err
	}
	if image.Blobs, err = layers(ctx, registry.Addr(), image.Name); err != nil {
		return nil, image, errors.Join(err, registry.Close())
	}
	for _, b := range image.Blobs {
		image.Size += b.Size
	}
	return registry, image, nil
}

// publish converts tar into the new registry in dir, and removes those that other
// converters made.
func publish(ctx context.Context, bin, tar, dir, name string, progress func(string)) (err error) {
	old, err := filepath.Glob(filepath.Join(filepath.Dir(dir), "registry-*"))
	if err != nil {
		return err
	}
	for _, dir := range old {
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	registry, err := regserver.New(dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, registry.Close()) }()
	progress("converting the root file system and pushing it into a registry on loopback")
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "erofsctl"), "convert", "--plain-http", tar, registry.Addr()+"/"+name)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("erofsctl convert: %w", err)
	}
	return os.WriteFile(filepath.Join(dir, "complete"), nil, 0o644)
}

// layers returns the layers of an image in the registry at addr.
func layers(ctx context.Context, addr, name string) ([]ocispec.Descriptor, error) {
	repository, tag, _ := strings.Cut(name, ":")
	var m ocispec.Manifest
	err := get(ctx, "http://"+addr+"/v2/"+repository+"/manifests/"+tag, func(body io.Reader) error {
		return json.NewDecoder(body).Decode(&m)
	})
	return m.Layers, err
}

// Download transfers all blobs of an image from addr at once, verifies their
// digests and throws them away. It returns the time.
func Download(ctx context.Context, addr string, image Image) (time.Duration, error) {
	repository, _, _ := strings.Cut(image.Name, ":")
	start := time.Now()
	errs := make([]error, len(image.Blobs))
	var all sync.WaitGroup
	for i, b := range image.Blobs {
		all.Go(func() {
			errs[i] = get(ctx, "http://"+addr+"/v2/"+repository+"/blobs/"+b.Digest.String(), func(body io.Reader) error {
				if got, err := digest.FromReader(body); err != nil || got != b.Digest {
					return fmt.Errorf("blob %s came as %s: %w", b.Digest, got, err)
				}
				return nil
			})
		})
	}
	all.Wait()
	return time.Since(start), errors.Join(errs...)
}

// get passes the body of url on. Its connection is not kept.
func get(ctx context.Context, url string, do func(io.Reader) error) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Accept", ocispec.MediaTypeImageManifest)
	req.Close = true
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("GET %s: %s", req.URL.Path, resp.Status)
	}
	return do(resp.Body)
}

// Every calls show at an interval until stop is called, which calls last, once.
func Every(interval time.Duration, show, last func()) (stop func()) {
	quit := make(chan struct{})
	var done sync.WaitGroup
	done.Go(func() {
		tick := time.NewTicker(interval)
		defer tick.Stop()
		for {
			select {
			case <-quit:
				return
			case <-tick.C:
				show()
			}
		}
	})
	return sync.OnceFunc(func() {
		close(quit)
		done.Wait()
		last()
	})
}
