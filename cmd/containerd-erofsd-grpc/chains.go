package main

import (
	"context"
	"errors"
	"fmt"

	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	namespacesapi "github.com/containerd/containerd/api/services/namespaces/v1"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// tops returns the chain ids of the uppermost layers of the images that containerd has by a
// name: those of all namespaces and platforms. None is no error.
func (f *finder) tops(ctx context.Context, name string) (chainIDs []string, err error) {
	list, err := namespacesapi.NewNamespacesClient(f.conn).List(ctx, &namespacesapi.ListNamespacesRequest{})
	if err != nil {
		return nil, fmt.Errorf("list namespaces: %w", err)
	}
	var errs []error
	for _, n := range list.Namespaces {
		ctx := namespaces.WithNamespace(ctx, n.Name)
		image, err := imagesapi.NewImagesClient(f.conn).Get(ctx, &imagesapi.GetImageRequest{Name: name})
		switch {
		case err == nil:
			found, err := f.topsIn(ctx, image.Image.Target.Digest, maxDepth)
			chainIDs, errs = append(chainIDs, found...), append(errs, err)
		case !errdefs.IsNotFound(errgrpc.ToNative(err)):
			errs = append(errs, fmt.Errorf("look for image in namespace %s: %w", n.Name, err))
		}
	}
	return chainIDs, errors.Join(errs...)
}

// topsIn is tops for a manifest, or an index of them.
func (f *finder) topsIn(ctx context.Context, d string, depth int) (chainIDs []string, err error) {
	var doc struct {
		Manifests []ocispec.Descriptor `json:"manifests"`
		Config    ocispec.Descriptor   `json:"config"`
	}
	if ok, err := f.read(ctx, d, &doc); !ok || depth == 0 {
		return nil, err
	}
	var errs []error
	for _, m := range doc.Manifests {
		found, err := f.topsIn(ctx, m.Digest.String(), depth-1)
		chainIDs, errs = append(chainIDs, found...), append(errs, err)
	}
	if doc.Config.Digest == "" {
		return chainIDs, errors.Join(errs...)
	}
	var image ocispec.Image
	ok, err := f.read(ctx, doc.Config.Digest.String(), &image)
	if ids := identity.ChainIDs(append([]digest.Digest{}, image.RootFS.DiffIDs...)); ok && len(ids) > 0 {
		chainIDs = append(chainIDs, ids[len(ids)-1].String())
	}
	return chainIDs, errors.Join(append(errs, err)...)
}
